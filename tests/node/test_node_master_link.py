"""The node's stream to its master, with a master that the test plays."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from kvstore.core.types import Tier
from kvstore.node import deltas, master_link
from kvstore_proto import master_pb2, master_pb2_grpc, node_pb2

from tests.master.rig import start_master
from tests.node.rig import BLOCK_BYTES, SYNCED, LocalNode, RawSession, keys_of, until

Report = master_pb2.NodeReport
Directive = master_pb2.Directive


class FakeMaster(master_pb2_grpc.MasterServicer):
    """Keeps every report, follows inventory and deltas, and sends what it is told to."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.held: set[tuple[int, str, bytes]] = set()
        self.sessions = 0
        self.ends = 0
        self.epoch = 5
        self.results: dict[int, master_pb2.DirectiveResult] = {}
        self.port = 0
        self._context: Any = None
        self._server: Any = None

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        master_pb2_grpc.add_MasterServicer_to_server(self, self._server)  # type: ignore[no-untyped-call,unused-ignore]
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)

    async def Session(  # type: ignore[override]
        self, request_iterator: object, context: Any
    ) -> None:
        self.held.clear()
        self.sessions += 1
        self._context = context
        async for report in request_iterator:  # type: ignore[attr-defined]
            self.reports.append(report)
            match report.WhichOneof("report"):
                case "hello":
                    welcome = master_pb2.MasterWelcome(cluster_epoch=self.epoch, heartbeat_ms=100)
                    await context.write(Directive(welcome=welcome))
                case "inventory" | "delta":
                    self._take(report.inventory if report.HasField("inventory") else report.delta)
                case "inventory_end":
                    self.ends += 1
                case "result":
                    self.results[report.result.id] = report.result

    def _take(self, events: master_pb2.BlockEvents) -> None:
        place = (int(events.tier), events.engine_id)
        if events.cleared:
            self.held = {h for h in self.held if h[:2] != place}
        self.held -= {(*place, key) for key in split(events.removed)}
        self.held |= {(*place, key) for key in split(events.stored)}

    async def Locate(self, request: object, context: object) -> Any:
        raise NotImplementedError

    def Watch(self, request: object, context: object) -> Any:
        raise NotImplementedError

    async def order(self, number: int, **directive: Any) -> master_pb2.DirectiveResult:
        order = Directive(id=number, cluster_epoch=self.epoch, **directive)
        await self._context.write(order)
        await until(lambda: number in self.results)
        return self.results[number]

    def kinds(self) -> list[str]:
        return [report.WhichOneof("report") or "" for report in self.reports]


def split(keys: bytes) -> list[bytes]:
    return [keys[i : i + 32] for i in range(0, len(keys), 32)]


@pytest.fixture
async def master() -> AsyncIterator[FakeMaster]:
    master = FakeMaster()
    await master.start()
    yield master
    await master.stop()


@pytest.fixture
async def linked(make_node: Callable[..., LocalNode], master: FakeMaster) -> LocalNode:
    node = make_node(master=f"127.0.0.1:{master.port}", node_id="n1")
    await node.start()
    await until(lambda: master.ends == 1)
    return node


async def test_master_learns_what_comes_and_goes(linked: LocalNode, master: FakeMaster) -> None:
    hello = master.reports[0].hello
    assert (hello.node_id, hello.instance) == ("n1", linked.node.instance)
    session = await RawSession.open(linked.address, engine_id="e1")
    assert session.welcome.has_master
    assert session.welcome.cluster_epoch == 5
    keys = keys_of(8)
    await session.put(keys, level=SYNCED)
    both = {(tier, "", key) for key in keys for tier in (Tier.DRAM, Tier.SSD)}
    await until(lambda: master.held == both)
    assert next(r.namespace for r in master.reports if r.HasField("namespace")).root == session.root

    events = node_pb2.HbmEvents(namespace_id=session.namespace, stored=keys[0] + keys[1])
    await session.send(hbm_events=events)
    await until(lambda: (Tier.HBM, "e1", keys[1]) in master.held)
    events = node_pb2.HbmEvents(namespace_id=session.namespace, removed=keys[1])
    await session.send(hbm_events=events)
    await until(lambda: (Tier.HBM, "e1", keys[1]) not in master.held)
    response = await session.call(hbm_events=node_pb2.HbmEvents(namespace_id=99))
    assert response.error.code == grpc.StatusCode.NOT_FOUND.value[0]
    events = node_pb2.HbmEvents(namespace_id=session.namespace, stored=keys[5], cleared=True)
    await session.send(hbm_events=events)
    await until(lambda: master.held == both | {(Tier.HBM, "e1", keys[5])})
    await session.goodbye()
    await until(lambda: master.held == both)


async def test_heartbeats_carry_space(linked: LocalNode, master: FakeMaster) -> None:
    await until(lambda: master.kinds().count("heartbeat") >= 3)
    heartbeat = next(r.heartbeat for r in reversed(master.reports) if r.HasField("heartbeat"))
    for tier in heartbeat.tiers:
        used = tier.free_bytes + tier.live_bytes + tier.pending_bytes + tier.quarantined_bytes
        assert used == tier.capacity_bytes
    assert [int(tier.tier) for tier in heartbeat.tiers] == [Tier.DRAM, Tier.SSD]


async def test_directives_are_carried_out(linked: LocalNode, master: FakeMaster) -> None:
    session = await RawSession.open(linked.address)
    keys = keys_of(8)
    await session.put(keys, level=SYNCED)
    dram: Any = Tier.DRAM.value
    result = await master.order(1, evict=master_pb2.EvictBlocks(tier=dram, keys=keys[7]))
    assert (result.blocks, result.bytes, result.error) == (1, BLOCK_BYTES, "")
    acquire_id, _, _ = await session.acquire(keys[:3])
    result = await master.order(2, evict=master_pb2.EvictBlocks(tier=dram))
    assert (result.blocks, result.pinned) == (4, 3)
    await session.send(release=node_pb2.Release(acquire_id=acquire_id))
    hbm: Any = Tier.HBM.value
    result = await master.order(3, evict=master_pb2.EvictBlocks(tier=hbm))
    assert "tier 1" in result.error
    result = await master.order(4)
    assert "does not know" in result.error
    result = await master.order(5, evict=master_pb2.EvictBlocks(tier=dram, keys=b"x"))
    assert "32" in result.error
    result = await master.order(6, purge=master_pb2.PurgeNamespace(root=session.root))
    assert result.blocks >= 8
    await until(lambda: not master.held)
    await session.goodbye()
    await linked.idle()


async def test_resync_sends_everything_again(linked: LocalNode, master: FakeMaster) -> None:
    session = await RawSession.open(linked.address, engine_id="e1")
    keys = keys_of(4)
    await session.put(keys, level=SYNCED)
    events = node_pb2.HbmEvents(namespace_id=session.namespace, stored=keys[0])
    await session.send(hbm_events=events)
    await until(lambda: len(master.held) == 9)
    assert (await master.order(1, resync=master_pb2.Resync())).error == ""
    await until(lambda: master.ends == 2)
    end = next(r.inventory_end for r in reversed(master.reports) if r.HasField("inventory_end"))
    assert end.blocks == 9
    assert len(master.held) == 9
    await session.goodbye()


async def test_I9_master_away_and_back(linked: LocalNode, master: FakeMaster) -> None:
    session = await RawSession.open(linked.address)
    await session.put(keys_of(4, 1), level=SYNCED)
    await master.stop()
    await until(lambda: not linked.node.link.connected)
    await session.put(keys_of(4, 2), level=SYNCED)
    assert (await session.check(keys_of(4, 1))).granted == 4
    await master.start()
    await until(lambda: master.ends == 2)
    assert len(master.held) == 16
    await session.goodbye()


async def test_I7_slow_master_gets_the_inventory_anew(
    linked: LocalNode, master: FakeMaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await RawSession.open(linked.address)
    monkeypatch.setattr(deltas, "BYTES_MAX", 64)
    await session.put(keys_of(8), level=SYNCED)
    await until(lambda: master.sessions == 2 and master.ends == 2)
    assert len(master.held) == 16
    await session.goodbye()


async def test_I5_master_of_an_older_epoch_is_refused(
    linked: LocalNode, master: FakeMaster
) -> None:
    master.epoch = 4
    await master.stop()
    await master.start()
    await until(lambda: master.sessions >= 3)
    assert not linked.node.link.connected
    assert linked.node.core.epoch.newest == 5
    master.epoch = 6
    await until(lambda: linked.node.link.connected)
    assert linked.node.core.epoch.newest == 6


async def test_I5_orders_under_an_older_epoch_change_nothing(
    linked: LocalNode, master: FakeMaster
) -> None:
    session = await RawSession.open(linked.address)
    keys = keys_of(4)
    await session.put(keys, level=SYNCED)
    master.epoch = 4
    purge = master_pb2.PurgeNamespace(root=session.root)
    result = await master.order(1, purge=purge)
    assert "epoch 4 is older than 5" in result.error
    evict: Any = {"tier": Tier.DRAM.value, "keys": keys[3]}
    assert "epoch 4" in (await master.order(2, evict=master_pb2.EvictBlocks(**evict))).error
    assert "epoch 4" in (await master.order(3, resync=master_pb2.Resync())).error
    assert (await session.check(keys)).granted == 4
    assert linked.node.core.counters["stale_epoch_orders"] == 3
    master.epoch = 6
    assert (await master.order(4, purge=purge)).error == ""
    assert linked.node.core.epoch.newest == 6
    await session.goodbye()


async def test_I5_a_master_moves_its_nodes_on_to_a_newer_epoch(
    linked: LocalNode, master: FakeMaster
) -> None:
    master.epoch = 9
    welcome = master_pb2.MasterWelcome(cluster_epoch=9, heartbeat_ms=100)
    assert (await master.order(1, welcome=welcome)).error == ""
    assert linked.node.core.epoch.newest == 9


async def test_node_without_a_master_says_so(
    make_node: Callable[..., LocalNode], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    node = make_node()
    await node.start()
    assert "works alone" in caplog.text
    session = await RawSession.open(node.address)
    assert not session.welcome.has_master
    await session.goodbye()


async def test_node_whose_master_is_away_says_so_once(
    make_node: Callable[..., LocalNode], caplog: pytest.LogCaptureFixture, master: FakeMaster
) -> None:
    await master.stop()
    node = make_node(master=f"127.0.0.1:{master.port}")
    await node.start()
    await until(lambda: "is away" in caplog.text)
    await asyncio.sleep(0.5)
    assert caplog.text.count("is away") == 1
    await master.start()
    await until(lambda: node.node.link.connected)


async def test_of_two_nodes_with_one_id_the_older_one_says_why_it_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with start_master(tmp_path / "master", heartbeat_ms=100) as master:
        nodes = []
        for name in ("older", "newer"):
            folder = tmp_path / name
            folder.mkdir()
            nodes.append(LocalNode(folder, master=master.address, node_id="twin"))
            await nodes[-1].start()
            await until(lambda: nodes[-1].node.link.connected)
        try:
            known = master.cluster.members
            lost = "working alone: two nodes have the id twin"
            await until(lambda: lost in caplog.text)
            await until(lambda: known.nodes["twin"].has_rival(time.monotonic()))
            assert (known.lost_total, nodes[1].node.link.connected) == (1, True)
            assert caplog.text.count(lost) == 1
        finally:
            for node in nodes:
                await node.stop()


async def test_I9_a_master_that_says_nothing_is_away(
    make_node: Callable[..., LocalNode],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(master_link, "WELCOME_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        node = make_node(master=f"127.0.0.1:{silent.getsockname()[1]}")
        await node.start()
        await until(lambda: "said nothing for" in caplog.text)
        await node.stop()
