"""At its limit a master drops the namespace reported longest ago that no node has."""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from kvstore.core.keys import namespace_root
from kvstore.core.locations import Locations
from kvstore.core.spec import CacheSpec
from kvstore.core.types import EndReason, Tier
from kvstore.errors import ResourceExhaustedError
from kvstore.master.state.lmdb import LmdbState
from kvstore_proto import master_pb2

from tests.master.rig import DEADLINE_S, DRAM, FakeNode, Master, keys, spec_message, until

LIMIT = 3


@pytest.fixture(autouse=True)
def _limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("kvstore.master.cluster", "kvstore.master.state.lmdb"):
        monkeypatch.setattr(f"{module}.NAMESPACES_MAX", LIMIT)


def spec(name: object) -> CacheSpec:
    return CacheSpec.raw(str(name), block_bytes=4096, block_tokens=4)


def root(name: object) -> bytes:
    return namespace_root(spec(name))


def report(name: object) -> master_pb2.NamespaceReport:
    return master_pb2.NamespaceReport(
        root=root(name), spec=spec_message(spec(name)), tenant="default"
    )


def names(master: Master) -> set[str]:
    """What the master lists; the medium has the same."""
    known = master.cluster.namespaces
    durable = {r.root: r for r in master.cluster._state.namespaces()}
    assert durable == known
    return {r.spec.model for r in known.values()}


async def drop(node: FakeNode, name: object) -> None:
    await node.report(dropped=master_pb2.NamespaceDropped(root=root(name)))


async def settled(node: FakeNode, master: Master) -> None:
    """Every report of the node was taken."""
    known = master.cluster.members.nodes[node.node_id]
    known.sessions = 0
    await node.heartbeat()
    await until(lambda: known.sessions != 0)


async def test_I7_any_number_of_namespaces_comes_and_goes(master: Master) -> None:
    node, other = await master.node("node-a"), await master.node("node-b")
    await node.namespace(spec("kept"))
    await node.delta(DRAM, root("kept"), stored=keys(0))
    for i in range(20):
        await other.namespace(spec(i))
        await drop(other, i)
    await settled(node, master)
    await settled(other, master)
    assert names(master) == {"kept", "18", "19"}
    assert await master.found(keys(0)) == 1


async def test_namespaces_of_nodes_that_are_here_stay(
    master: Master, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = await master.node("node-a"), await master.node("node-b")
    for name in "ab":
        await first.namespace(spec(name))
    await second.namespace(spec("b"))
    await second.namespace(spec("c"))
    await settled(first, master)
    await settled(second, master)
    with caplog.at_level(logging.WARNING):
        await second.namespace(spec("late"))
        await settled(second, master)
    assert names(master) == {"a", "b", "c"}
    assert "3 namespaces are known, the most that a master keeps" in caplog.text
    assert "kvstore purge" in caplog.text
    first.drop()
    await until(lambda: len(master.cluster.members.connected()) == 1)
    await second.namespace(spec("late"))
    await settled(second, master)
    assert names(master) == {"b", "c", "late"}
    await drop(second, "b")
    await second.namespace(spec("later"))
    await settled(second, master)
    assert names(master) == {"c", "late", "later"}


async def test_a_namespace_with_blocks_stays_though_no_node_reports_it(
    make_master: Callable[..., Any],
) -> None:
    async with make_master() as master:
        node = await master.node()
        for name in "abc":
            await node.namespace(spec(name))
        await settled(node, master)
    async with make_master() as master:
        assert names(master) == {"a", "b", "c"}
        node = await master.node()
        oldest = next(iter(master.cluster.namespaces.values())).spec.model
        await node.delta(DRAM, root(oldest), stored=keys(0))
        for name in "xy":
            await node.namespace(spec(name))
        await settled(node, master)
        assert names(master) == {oldest, "x", "y"}
        await node.delta(DRAM, root(oldest), removed=keys(0))
        await node.namespace(spec("z"))
        await settled(node, master)
        assert names(master) == {"x", "y", "z"}


async def test_the_one_reported_longest_ago_goes(master: Master) -> None:
    node = await master.node()
    for name in ("a", "b", "c", "a"):
        await node.namespace(spec(name))
    for name in "abc":
        await drop(node, name)
    await node.namespace(spec("new"))
    await settled(node, master)
    assert names(master) == {"c", "a", "new"}


class SlowState:
    """Puts that wait until they are let."""

    def __init__(self, state: LmdbState, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[tuple[bytes, bytes]] = []
        self.may_end = threading.Semaphore(0)
        self._put = state.put_namespace
        monkeypatch.setattr(state, "put_namespace", self._slowly)

    def _slowly(self, report: master_pb2.NamespaceReport, dropped: bytes = b"") -> None:
        self.begun.append((report.root, dropped))
        assert self.may_end.acquire(timeout=DEADLINE_S)
        self._put(report, dropped)


async def test_a_namespace_that_is_reported_while_it_is_dropped_stays(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = master.cluster
    for name in "abc":
        await cluster.add_namespace(report(name))
    slow = SlowState(cluster._state, monkeypatch)  # type: ignore[arg-type]
    opening = asyncio.create_task(cluster.add_namespace(report("new")))
    await until(lambda: slow.begun == [(root("new"), root("a"))])
    back = asyncio.create_task(cluster.add_namespace(report("a")))
    slow.may_end.release(2)
    await asyncio.gather(opening, back)
    assert slow.begun[1] == (root("a"), root("b"))
    assert names(master) == {"c", "new", "a"}


async def test_two_nodes_that_report_one_namespace_at_once_drop_one(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = master.cluster
    for name in "abc":
        await cluster.add_namespace(report(name))
    slow = SlowState(cluster._state, monkeypatch)  # type: ignore[arg-type]
    slow.may_end.release(2)
    await asyncio.gather(*(cluster.add_namespace(report("new")) for _ in range(2)))
    assert names(master) == {"b", "c", "new"}


async def test_I11_two_that_want_the_last_place_do_not_drop_each_other(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    await (await master.node("node-a")).namespace(spec("kept"))
    for name in ("old", "older"):
        await master.cluster.add_namespace(report(name))
    puts = 0
    put = master.cluster._state.put_namespace

    def counting(*args: Any) -> None:
        nonlocal puts
        puts += 1
        put(*args)

    monkeypatch.setattr(master.cluster._state, "put_namespace", counting)
    master.cluster._adding[root("old")] += 1  # so that one place is left
    adding = [master.cluster.add_namespace(report(name)) for name in ("b", "c")]
    outcomes = await asyncio.wait_for(asyncio.gather(*adding, return_exceptions=True), DEADLINE_S)
    assert sum(isinstance(outcome, ResourceExhaustedError) for outcome in outcomes) == 1
    assert puts == 1
    assert names(master) in ({"kept", "old", "b"}, {"kept", "old", "c"})


async def test_I11_a_node_that_waits_for_a_slow_write_is_not_lost(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await master.node("node-a")
    known = master.cluster.members.nodes["node-a"]
    link = known.link
    assert link is not None
    writes, go_on = threading.Event(), threading.Event()
    put = master.cluster._state.put_namespace

    def slow(*args: Any) -> None:
        writes.set()
        assert go_on.wait(DEADLINE_S)
        put(*args)

    monkeypatch.setattr(master.cluster._state, "put_namespace", slow)
    await node.report(namespace=report("slow"))
    await until(writes.is_set)
    members = master.cluster.members
    members._checked_at = later = time.monotonic() + 3600.0
    assert members.overdue(later) == []
    known.last_seen = 0.0
    go_on.set()
    await until(lambda: not link.held_up)
    assert known.last_seen
    members._checked_at = later
    assert members.overdue(later) == [link]  # as without the write


async def test_a_drop_that_cannot_be_durable_is_none(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = master.cluster
    for name in "abc":
        await cluster.add_namespace(report(name))

    def full(_report: object, _dropped: object) -> None:
        raise ResourceExhaustedError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(cluster._state, "put_namespace", full)
        with contextlib.suppress(ResourceExhaustedError):
            await cluster.add_namespace(report("new"))
    assert names(master) == {"a", "b", "c"}
    await cluster.add_namespace(report("new"))
    assert len(names(master)) == LIMIT


@pytest.mark.parametrize("before", ["ab", "abc"])
async def test_I7_a_stream_that_breaks_during_a_write_leaves_medium_and_memory_alike(
    before: str, master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = master.cluster
    for name in before:
        await cluster.add_namespace(report(name))
    node, leaving = await master.node("node-a"), await master.node("node-b")
    slow = SlowState(cluster._state, monkeypatch)  # type: ignore[arg-type]
    await leaving.namespace(spec("late"))
    await until(lambda: bool(slow.begun))
    leaving.drop()
    await until(lambda: len(cluster.members.connected()) == 1)
    slow.may_end.release(10)
    await cluster.written()
    assert names(master) == {*before, "late"} - ({"a"} if before == "abc" else set())
    for i in range(4):
        await node.namespace(spec(i))
        await settled(node, master)
        assert str(i) in names(master)
        await drop(node, i)


async def test_a_namespace_that_could_not_be_kept_is_tried_again(
    master: Master, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_report: object, _dropped: object) -> None:
        raise ResourceExhaustedError("no room")

    node = await master.node()
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(master.cluster._state, "put_namespace", full)
        for name in ("a", "b", "gone"):
            await node.namespace(spec(name))
        await drop(node, "gone")
        for _ in range(3):
            await settled(node, master)
        assert names(master) == set()
        assert caplog.text.count("is not kept: no room") == 3, "each is logged once"
    await node.heartbeat()
    await until(lambda: master.cluster.index.reported.keys() == {root("a"), root("b")})
    assert names(master) == {"a", "b"}


async def test_a_report_without_a_spec_leaves_the_one_that_is_known(master: Master) -> None:
    first, second = await master.node("node-a"), await master.node("node-b")
    await first.namespace(spec("a"))
    await settled(first, master)
    await second.report(namespace=master_pb2.NamespaceReport(root=root("a")))
    await second.report(namespace=master_pb2.NamespaceReport(root=root("b")))
    await second.namespace(spec("b"))
    await settled(second, master)
    assert names(master) == {"a", "b"}
    assert master.cluster.index.reported[root("a")] == 2


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        ({"block_tokens": 0}, "block_tokens is 0"),
        ({"block_bytes": 1 << 40}, "block_bytes is"),
        ({"model": "m" * 5000}, "model is longer than 4096"),
        ({"format_version": 9}, "format_version is 9"),
        ({"tenant": "t" * 5000}, "tenant has 5000 bytes"),
    ],
)
async def test_I11_a_namespace_that_can_be_none_is_refused_and_the_node_stays(
    odd: dict[str, Any], why: str, master: Master, caplog: pytest.LogCaptureFixture
) -> None:
    node = await master.node()
    bad = report("odd")
    for field, value in odd.items():
        setattr(bad if field == "tenant" else bad.spec, field, value)
    with caplog.at_level(logging.WARNING):
        await node.report(namespace=bad)
        await node.namespace(spec("a"))
        await settled(node, master)
    assert names(master) == {"a"}
    assert f"namespace {root('odd').hex()} of node node-a is refused" in caplog.text
    assert why in caplog.text
    assert len(caplog.text) < 1000


def test_I7_places_of_dropped_namespaces_are_forgotten() -> None:
    locations = Locations()
    kept = locations.place("a", Tier.DRAM, b"k" * 32)
    locations.stored(kept, keys(0))
    sizes = set()
    for i in range(1, 50):
        name = bytes([i]) * 32
        for tier in (Tier.DRAM, Tier.SSD):
            place = locations.place("a", tier, name)
            locations.stored(place, keys(i))
            locations.removed(place, keys(i))
        locations.remove_namespace("a", name)
        assert locations.roots() == {b"k" * 32}
        assert locations.locate(keys(i)).reason == EndReason.EVICTED
        sizes.add((len(locations._places), len(locations._all())))
    assert len(sizes) == 1, "it grows with every namespace"
    assert locations.places_of(keys(0)) == (kept,)
