"""Namespaces of a node: durable without holding anybody up, dropped when nothing needs them."""

import asyncio
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path

import grpc
import pytest
from kvstore.core.spec import CacheSpec
from kvstore.core.types import CoreConfig, Tier
from kvstore.faultpoint import enable_faultpoints
from kvstore.node import translate
from kvstore.node.hbm import HbmInventory
from kvstore.node.reports import Reports
from kvstore.node.ssd_index import SsdIndex
from kvstore_proto import master_pb2, node_pb2

from tests.node.rig import (
    BLOCK_BYTES,
    SPEC,
    SYNCED,
    TIMEOUT_S,
    Daemon,
    LocalNode,
    RawSession,
    keys_of,
    until,
)
from tests.store.rig import Rig, chain

MakeNode = Callable[..., LocalNode]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """Nodes take three namespaces at a time."""
    monkeypatch.setattr(
        "kvstore.node.node.CoreConfig", functools.partial(CoreConfig, namespaces_max=3)
    )
    return 3


@pytest.fixture(autouse=True)
def _no_faults() -> Iterator[None]:
    yield
    enable_faultpoints({})


def spec(name: object) -> CacheSpec:
    return CacheSpec.raw(str(name), block_bytes=BLOCK_BYTES)


def index_of(node: LocalNode) -> SsdIndex:
    assert node.node.driver.ssd is not None
    return node.node.driver.ssd.index


class SlowIndex:
    """Commits of namespaces that begin when they are asked to, and end when they are let."""

    def __init__(self, node: LocalNode, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[tuple[set[bytes], set[bytes]]] = []
        self.may_end = threading.Semaphore(0)
        self._commit = index_of(node).change_namespaces
        monkeypatch.setattr(index_of(node), "change_namespaces", self._change)

    def _change(self, fresh: Mapping[bytes, bytes], gone: Set[bytes]) -> bool:
        self.begun.append((set(fresh), set(gone)))
        assert self.may_end.acquire(timeout=TIMEOUT_S)
        return self._commit(fresh, gone)


async def test_I7_namespaces_come_and_go_while_blocks_stay(make_node: MakeNode, limit: int) -> None:
    node = make_node()
    await node.start()
    keeper = await RawSession.open(node.address)
    await keeper.put(keys_of(4), level=SYNCED)
    ids = {keeper.namespace}
    for i in range(4 * limit):
        session = await RawSession.open(node.address, spec=spec(i))
        assert session.namespace not in ids
        ids.add(session.namespace)
        await session.goodbye()
        assert len(index_of(node).namespaces()) <= limit
        assert session.root in index_of(node).namespaces()
    assert (await keeper.check(keys_of(4))).granted == 4
    await keeper.goodbye()
    assert node.node.core.counters["dropped_namespaces"] == 4 * limit - (limit - 1)
    await node.idle()

    await node.stop()
    again = make_node()
    await again.start()
    assert [n.root for n in again.node.core.namespaces()] == [keeper.root]
    session = await RawSession.open(again.address)
    assert (await session.check(keys_of(4))).granted == 4
    await session.goodbye()


async def test_I7_a_limit_of_open_namespaces_is_refused_clearly(
    make_node: MakeNode, limit: int
) -> None:
    node = make_node()
    await node.start()
    holder = await RawSession.open(node.address, namespace=False)
    for i in range(limit):
        await holder.open_namespace(spec(i))
    late = await RawSession.open(node.address, namespace=False)
    opening = node_pb2.OpenNamespace(spec=translate.spec_to_message(spec("late")))
    error = (await late.call(open_namespace=opening)).error
    assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert "3 namespaces are open" in error.message
    assert "close the clients" in error.message
    assert "kvstore purge" in error.message
    await holder.goodbye()
    await late.open_namespace(spec("late"))
    assert await late.put(keys_of(1), level=SYNCED) == bytes([SYNCED])
    await late.goodbye()


async def test_a_namespace_with_blocks_in_hbm_stays(make_node: MakeNode, limit: int) -> None:
    node = make_node()
    await node.start()
    engine = await RawSession.open(node.address, engine_id="e")
    other = await RawSession.open(node.address, namespace=False, engine_id="e")
    key = keys_of(1)[0]
    await engine.send(hbm_events=node_pb2.HbmEvents(namespace_id=engine.namespace, stored=key))
    await until(lambda: node.node.hbm.roots() == {engine.root})
    await engine.goodbye()
    for i in range(2 * limit):
        await (await RawSession.open(node.address, spec=spec(i))).goodbye()
    assert engine.root in {n.root for n in node.node.core.namespaces()}
    await other.goodbye()
    await until(lambda: not node.node.hbm.roots())
    for i in range(2 * limit):
        await (await RawSession.open(node.address, spec=spec(i))).goodbye()
    assert engine.root not in {n.root for n in node.node.core.namespaces()}


async def test_a_commit_of_a_namespace_holds_nobody_up(
    node: LocalNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = await RawSession.open(node.address)
    slow = SlowIndex(node, monkeypatch)
    first = await RawSession.open(node.address, namespace=False)
    second = await RawSession.open(node.address, namespace=False)
    opening = [asyncio.create_task(s.open_namespace(spec("new"))) for s in (first, second)]
    await until(lambda: len(slow.begun) == 1)
    assert await working.put(keys_of(4)) == bytes([1] * 4)
    assert (await working.check(keys_of(4))).granted == 4
    assert not any(task.done() for task in opening)
    slow.may_end.release()
    await asyncio.gather(*opening)
    assert (first.namespace, first.root) == (second.namespace, second.root)
    assert slow.begun == [({first.root}, set())]
    assert first.root in index_of(node).namespaces()
    for session in (working, first, second):
        await session.goodbye()


async def test_one_commit_takes_in_all_that_were_opened_during_the_last(
    node: LocalNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowIndex(node, monkeypatch)
    sessions = [await RawSession.open(node.address, namespace=False) for _ in range(6)]
    opening = [asyncio.create_task(s.open_namespace(spec(i))) for i, s in enumerate(sessions)]
    await until(lambda: len(node.node.core.namespaces()) == 6)
    slow.may_end.release(2)
    await asyncio.gather(*opening)
    assert [len(fresh) for fresh, _ in slow.begun] == [1, 5]
    assert set(index_of(node).namespaces()) == {s.root for s in sessions}
    for session in sessions:
        await session.goodbye()


async def test_a_namespace_that_returns_while_it_is_dropped_is_durable(
    make_node: MakeNode, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node()
    await node.start()
    for i in range(limit):
        await (await RawSession.open(node.address, spec=spec(i))).goodbye()
    gone = node.node.core.namespaces()[0]
    slow = SlowIndex(node, monkeypatch)
    first = await RawSession.open(node.address, namespace=False)
    second = await RawSession.open(node.address, namespace=False)
    opening = [asyncio.create_task(first.open_namespace(spec("new")))]
    await until(lambda: len(slow.begun) == 1)
    assert gone.root in slow.begun[0][1]
    opening.append(asyncio.create_task(second.open_namespace(spec(0))))
    await until(lambda: gone.root in {n.root for n in node.node.core.namespaces()})
    slow.may_end.release(2)
    await asyncio.gather(*opening)
    assert second.root == gone.root
    assert second.namespace != gone.id
    assert {first.root, second.root} <= set(index_of(node).namespaces())
    assert len(index_of(node).namespaces()) == limit
    await first.goodbye()
    await second.goodbye()


async def test_a_client_that_goes_while_its_namespace_is_committed_leaves_no_trace(
    node: LocalNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowIndex(node, monkeypatch)
    first = await RawSession.open(node.address, namespace=False)
    opening = asyncio.create_task(first.open_namespace(spec("new")))
    await until(lambda: len(slow.begun) == 1)
    opening.cancel()
    await first.lose()
    await until(lambda: node.node.sessions_open() == 0)
    second = await RawSession.open(node.address, namespace=False)
    again = asyncio.create_task(second.open_namespace(spec("new")))
    slow.may_end.release()
    await again
    assert slow.begun == [({second.root}, set())]
    await second.goodbye()


async def test_a_node_that_stops_waits_for_a_commit_of_a_namespace(
    node: LocalNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowIndex(node, monkeypatch)
    session = await RawSession.open(node.address, namespace=False)
    opening = asyncio.create_task(session.open_namespace(spec("new")))
    await until(lambda: len(slow.begun) == 1)
    threading.Timer(0.2, slow.may_end.release).start()
    await node.stop()
    opening.cancel()
    await session.lose()
    index = SsdIndex.existing(tmp_path / "data" / "ssd", read_only=True)
    assert set(index.namespaces()) == slow.begun[0][0]
    index.close()


async def test_a_commit_that_fails_is_made_at_the_next_opening(node: LocalNode) -> None:
    enable_faultpoints({"KVSTORE_FAULTPOINTS": "ssd.namespaces:enospc"})
    session = await RawSession.open(node.address)
    assert session.root not in index_of(node).namespaces()
    assert await session.put(keys_of(2), level=SYNCED) == bytes([SYNCED] * 2)
    await session.open_namespace(SPEC)
    assert session.root in index_of(node).namespaces()
    await session.goodbye()


async def test_a_commit_that_fails_is_not_made_again_for_each_that_waited(
    node: LocalNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowIndex(node, monkeypatch)
    every = ",".join(f"ssd.namespaces:enospc@{n}" for n in range(1, 11))
    enable_faultpoints({"KVSTORE_FAULTPOINTS": every})
    sessions = [await RawSession.open(node.address, namespace=False) for _ in range(6)]
    opening = [asyncio.create_task(s.open_namespace(spec(i))) for i, s in enumerate(sessions)]
    await until(lambda: len(node.node.core.namespaces()) == 6)
    slow.may_end.release(10)
    await asyncio.gather(*opening)
    assert len(slow.begun) == 2
    for session in sessions:
        await session.goodbye()


async def test_I8_kill_9_between_two_namespaces(make_daemon: Callable[..., Daemon]) -> None:
    os.environ["KVSTORE_FAULTPOINTS"] = "ssd.namespaces:kill@2"
    try:
        daemon = make_daemon()
    finally:
        del os.environ["KVSTORE_FAULTPOINTS"]
    daemon.wait_ready()
    session = await RawSession.open(daemon.address)
    await session.put(keys_of(4), level=SYNCED)
    with pytest.raises((grpc.aio.AioRpcError, EOFError)):
        await session.open_namespace(spec("new"))
    assert daemon.process.wait(TIMEOUT_S) == -signal.SIGKILL
    await session.lose()
    daemon = make_daemon()
    daemon.wait_ready()
    session = await RawSession.open(daemon.address)
    assert (await session.check(keys_of(4))).granted == 4
    await session.open_namespace(spec("new"))
    assert await session.put(keys_of(2, seed=2), level=SYNCED) == bytes([SYNCED] * 2)
    await session.goodbye()


class TalkingNode:
    """What Reports needs of a node, without one."""

    def __init__(self, rig: Rig) -> None:
        self.node_id, self.instance, self.address = "n", 1, "unix:/n"
        self.core, self.hbm = rig.core, HbmInventory()
        self.now, self.apply = (lambda: rig.now), rig.apply

    def sessions_open(self) -> int:
        return 0

    def problems(self) -> list[str]:
        return []


def told(reports: Reports) -> list[tuple[str, str]]:
    """Opened and dropped namespaces by their names, and tiers of blocks, in their order."""
    found: list[tuple[str, str]] = []
    for report in reports.due():
        kind = report.WhichOneof("report") or ""
        if kind == "namespace":
            found.append((kind, report.namespace.spec.model))
        elif kind == "dropped":
            found.append((kind, report.dropped.root.hex()))
        elif kind == "delta":
            found.append((kind, Tier(report.delta.tier).name))
    return found


def is_urgent(reports: Reports) -> bool:
    return reports.urgent


def test_I7_the_master_is_told_of_namespaces_once_and_of_those_that_have_gone() -> None:
    rig = Rig(16, namespaces_max=2)
    rig.open()
    reports = Reports(TalkingNode(rig))
    reports.namespaces_changed()
    reports.welcomed(master_pb2.MasterWelcome(cluster_epoch=1))
    assert told(reports) == [("namespace", "test")]
    rig.put(chain("A", 1))
    for i in range(1000):
        rig.core.open_namespace(spec(i % 7))
        reports.namespaces_changed()
    assert is_urgent(reports)
    [last] = (n for n in rig.core.namespaces() if n is not rig.namespace)
    assert told(reports) == [("namespace", str(999 % 7))]
    assert not is_urgent(reports)
    for _ in range(3):
        rig.core.open_namespace(last.spec or SPEC)
        reports.namespaces_changed()
    assert told(reports) == []

    rig.core.open_namespace(spec("next"))
    reports.namespaces_changed()
    reports.changed(last.root, Tier.DRAM, "", b"", chain("B", 1)[0])
    assert told(reports) == [
        ("namespace", "next"),
        ("delta", "DRAM"),
        ("dropped", last.root.hex()),
    ]
    assert told(reports) == []
    reports.welcomed(master_pb2.MasterWelcome(cluster_epoch=1))
    assert told(reports) == [("namespace", "test"), ("namespace", "next")]


def test_I7_a_namespace_that_came_and_went_unheard_is_told_as_dropped() -> None:
    rig = Rig(16, namespaces_max=2)
    rig.open()
    rig.put(chain("A", 1))
    reports = Reports(TalkingNode(rig))
    reports.welcomed(master_pb2.MasterWelcome(cluster_epoch=1))
    told(reports)
    short = rig.core.open_namespace(spec("short"))
    reports.changed(short.root, Tier.DRAM, "", chain("B", 1)[0], b"")
    reports.changed(short.root, Tier.DRAM, "", b"", chain("B", 1)[0])
    rig.core.open_namespace(spec("next"))
    reports.namespaces_changed()
    assert told(reports)[-1] == ("dropped", short.root.hex())
    assert ("dropped", short.root.hex()) not in told(reports)


def test_blocks_of_a_namespace_are_told_after_it() -> None:
    rig = Rig(16, namespaces_max=4)
    rig.open()
    rig.put(chain("A", 1))
    reports = Reports(TalkingNode(rig))
    reports.welcomed(master_pb2.MasterWelcome(cluster_epoch=1))
    due = reports.due()
    next(due)
    late = rig.core.open_namespace(spec("late"))
    reports.namespaces_changed()
    reports.changed(late.root, Tier.DRAM, "", chain("B", 1)[0], b"")
    kinds = [report.WhichOneof("report") for report in due]
    assert kinds[-2:] == ["namespace", "delta"]
    assert told(reports) == []


def test_a_namespace_found_on_ssd_is_told_again_when_its_spec_is_known() -> None:
    rig = Rig(4)
    rig.namespace.spec = None
    reports = Reports(TalkingNode(rig))
    reports.welcomed(master_pb2.MasterWelcome(cluster_epoch=1))
    assert told(reports) == [("namespace", "")]
    rig.core.open_namespace(rig.spec)
    reports.namespaces_changed()
    assert told(reports) == [("namespace", "test")]
