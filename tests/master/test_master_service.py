"""Sessions of nodes, Locate and Watch, over real gRPC against fake nodes."""

import asyncio
import contextlib
import time
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import grpc
import pytest
from kvstore.core.spec import CacheSpec
from kvstore.master import service
from kvstore_proto import admin_pb2, master_pb2

from tests.master.rig import DRAM, HBM, ROOT, SSD, FakeNode, Master, keys, until


class MakeMaster(Protocol):
    def __call__(self, **options: object) -> AbstractAsyncContextManager[Master]: ...


async def test_an_inventory_makes_a_node_ready_and_its_blocks_found(master: Master) -> None:
    node = await master.node()
    assert node.welcome.cluster_epoch == 1
    assert node.welcome.heartbeat_ms == 60_000
    await node.namespace()
    await node.inventory(SSD, keys(0, 1, 2))
    await until(lambda: master.cluster.locations.entries == 3)
    assert master.cluster.members.nodes["node-a"].state.value == "syncing"
    await node.inventory(DRAM, keys(0, 1))
    await node.end_inventory(5)
    await until(lambda: master.cluster.members.nodes["node-a"].state.value == "ready")
    answer = await master.stub.Locate(master_pb2.LocateRequest(keys=keys(0, 1, 2, 3)))
    assert [(r.first, r.count, r.node_id, r.tier) for r in answer.runs] == [
        (0, 2, "node-a", DRAM),
        (2, 1, "node-a", SSD),
    ]
    assert answer.found == 3


async def test_deltas_change_what_is_found(master: Master) -> None:
    node = await master.ready_node(dram=keys(0, 1))
    await node.delta(DRAM, stored=keys(2), removed=keys(0))
    await node.delta(HBM, stored=keys(0), engine_id="engine-1")
    await until(lambda: len(master.cluster.locations.places_of(keys(2))) == 1)
    answer = await master.stub.Locate(master_pb2.LocateRequest(keys=keys(0, 1, 2)))
    assert [(r.count, r.tier, r.engine_id) for r in answer.runs] == [
        (1, HBM, "engine-1"),
        (2, DRAM, ""),
    ]
    await node.delta(HBM, cleared=True, engine_id="engine-1")
    await until(lambda: not master.cluster.locations.places_of(keys(0)))
    assert await master.found(keys(0)) == 0


async def test_I1_blocks_of_a_lost_node_are_gone_when_its_stream_ends(master: Master) -> None:
    node = await master.ready_node(dram=keys(0, 1))
    other = await master.ready_node("node-b", ssd=keys(1))
    started = time.monotonic()
    node.drop()
    await until(lambda: master.cluster.members.nodes["node-a"].state.value == "lost")
    assert time.monotonic() - started < 1.0
    assert await master.found(keys(0)) == 0
    assert await master.found(keys(1)) == 1
    assert other.node_id in {p.node_id for p in master.cluster.locations.places_of(keys(1))}


async def test_a_silent_node_is_lost_after_two_heartbeats(make_master: MakeMaster) -> None:
    async with make_master(heartbeat_ms=100) as master:
        node = await master.ready_node(dram=keys(0))
        for _ in range(6):
            await asyncio.sleep(0.05)
            await node.heartbeat()
        assert await master.found(keys(0)) == 1
        code, why = await node.status()
        assert (code, await master.found(keys(0))) == (grpc.StatusCode.UNAVAILABLE, 0)
        assert "no report for 0.2 s" in why
        assert master.cluster.members.lost_total == 1


async def test_a_newer_connection_takes_over(master: Master) -> None:
    old = await master.ready_node(dram=keys(0))
    new = await master.node(instance=2)
    assert (await old.status())[0] == grpc.StatusCode.UNAVAILABLE
    assert await master.found(keys(0)) == 0, "only what the new instance reports is there"
    await new.inventory(SSD, keys(0))
    await new.end_inventory(1)
    await until(lambda: master.cluster.members.nodes["node-a"].state.value == "ready")
    assert await master.found(keys(0)) == 1


async def test_two_nodes_of_one_id_do_not_throw_each_other_out_for_ever(
    master: Master, caplog: pytest.LogCaptureFixture
) -> None:
    older = await master.node(instance=1, address="unix:/older")
    newer = await master.node(instance=2, address="unix:/newer")
    code, why = await older.status()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "from unix:/newer, took over" in why
    for _ in range(3):
        with pytest.raises(grpc.RpcError, match="FAILED_PRECONDITION") as refused:
            await master.node(instance=1, address="unix:/older")
    for part in ("two nodes have the id node-a", "unix:/newer", "unix:/older", "--node-id"):
        assert part in str(refused.value)
    assert caplog.text.count("two nodes have the id node-a") == 1
    await newer.heartbeat()
    node = master.cluster.members.nodes["node-a"]
    await until(lambda: node.sessions == 3)
    assert node.known.address == "unix:/newer"
    status = await master.admin.Status(admin_pb2.StatusRequest())
    listed = await master.admin.ListNodes(admin_pb2.ListNodesRequest())
    assert ["at unix:/older, has the same id" in text for text in status.problems] == [True]
    assert len(listed.nodes[0].problems) == 1
    newer.drop()
    await until(lambda: node.link is None)
    await master.node(instance=1, address="unix:/older")
    status = await master.admin.Status(admin_pb2.StatusRequest())
    assert not status.problems, "the other one has gone"


async def test_I8_an_inventory_that_does_not_add_up_is_asked_for_again(master: Master) -> None:
    node = await master.node()
    await node.inventory(DRAM, keys(0, 9))
    await node.end_inventory(3)
    assert (await node.directive()).WhichOneof("directive") == "resync"
    await node.inventory(DRAM, keys(0, 1, 2))
    await node.end_inventory(3)
    await until(lambda: master.cluster.members.nodes["node-a"].state.value == "ready")
    assert await master.found(keys(0, 1, 2)) == 3
    assert await master.found(keys(9)) == 0, "the first inventory is forgotten"


async def test_an_inventory_that_never_adds_up_ends_the_session(master: Master) -> None:
    node = await master.node()
    for _ in range(3):
        await node.end_inventory(1)
        assert (await node.directive()).WhichOneof("directive") == "resync"
    await node.end_inventory(1)
    assert (await node.status())[0] == grpc.StatusCode.INVALID_ARGUMENT


async def test_I8_a_restarted_master_knows_epoch_nodes_and_namespaces(
    make_master: MakeMaster,
) -> None:
    async with make_master() as master:
        await master.ready_node(dram=keys(0))
    async with make_master() as master:
        assert await master.found(keys(0)) == 0, "no block without a node that has it"
        nodes = (await master.admin.ListNodes(admin_pb2.ListNodesRequest())).nodes
        assert [(n.node_id, n.state, n.hostname) for n in nodes] == [("node-a", "lost", "host")]
        node = await master.ready_node(dram=keys(0))
        assert node.welcome.cluster_epoch == 2
        assert await master.found(keys(0)) == 1
        names = (await master.admin.ListNamespaces(admin_pb2.ListNamespacesRequest())).namespaces
        assert [(n.root, n.spec.model, n.tenant, n.blocks) for n in names] == [
            (ROOT, "tests", "default", 1)
        ]


async def test_I8_a_forgotten_node_stays_forgotten_and_may_join_again(
    make_master: MakeMaster,
) -> None:
    async with make_master() as master:
        node = await master.ready_node()
        request = admin_pb2.ForgetNodeRequest(node_id="node-a")
        with pytest.raises(grpc.aio.AioRpcError, match="is connected") as caught:
            await master.admin.ForgetNode(request)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        node.drop()
        await until(lambda: master.cluster.members.nodes["node-a"].state.value == "lost")
        await master.admin.ForgetNode(request)
        with pytest.raises(grpc.aio.AioRpcError, match="no node 'node-a'") as caught:
            await master.admin.ForgetNode(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    async with make_master() as master:
        assert master.cluster.members.nodes == {}
        await master.ready_node()
    async with make_master() as master:
        assert list(master.cluster.members.nodes) == ["node-a"]


async def test_I5_the_epoch_outgrows_what_any_node_has_seen(make_master: MakeMaster) -> None:
    async with make_master() as master:
        first = await master.node("node-a")
        second = await master.node("node-b", epoch=41)
        assert second.welcome.cluster_epoch == 42
        assert (await first.directive()).welcome.cluster_epoch == 42
    async with make_master() as master:
        assert (await master.node()).welcome.cluster_epoch == 43


async def test_I5_an_epoch_far_above_the_master_s_is_refused(make_master: MakeMaster) -> None:
    step = 1 << 20
    async with make_master() as master:
        good = await master.node("good")
        for epoch in (step + 2, (1 << 62) + 1, (1 << 64) - 1):
            with pytest.raises(
                grpc.RpcError,
                match=rf"INVALID_ARGUMENT.* {epoch} .* epoch 1 of .* restart the",
            ):
                await master.node("bad", epoch=epoch)
        assert master.cluster.epoch == 1
        assert list(master.cluster.members.nodes) == ["good"]
        assert (await master.node("other", epoch=step + 1)).welcome.cluster_epoch == step + 2
        assert (await good.directive()).welcome.cluster_epoch == step + 2
        assert (await master.node("again", epoch=step + 2)).welcome.cluster_epoch == step + 2


async def test_I5_a_node_at_the_epoch_of_its_master_is_let_in_however_high(
    make_master: MakeMaster,
) -> None:
    async with make_master() as master:
        high = master.cluster._state.raise_epoch(1 << 62)
    async with make_master() as master:
        for node_id, epoch in (("older", high), ("same", high + 1)):
            node = await master.node(node_id, epoch=epoch)
            assert node.welcome.cluster_epoch == high + 1


@pytest.mark.parametrize(
    ("report", "code", "says"),
    [
        ({"heartbeat": master_pb2.Heartbeat()}, "FAILED_PRECONDITION", "must be hello"),
        (
            {"hello": master_pb2.NodeHello(protocol_version=2, node_id="n")},
            "FAILED_PRECONDITION",
            "protocol version 2, this master 1",
        ),
        (
            {"hello": master_pb2.NodeHello(protocol_version=1, node_id="a/b")},
            "INVALID_ARGUMENT",
            "node id 'a/b'",
        ),
        (
            {"hello": master_pb2.NodeHello(protocol_version=1, node_id="a", cluster_epoch=1 << 63)},
            "INVALID_ARGUMENT",
            "epoch",
        ),
        (
            {"hello": master_pb2.NodeHello(protocol_version=1, node_id="a", hostname="h" * 2000)},
            "INVALID_ARGUMENT",
            "1024 characters",
        ),
    ],
)
async def test_I11_a_wrong_first_report_is_refused(
    master: Master, report: dict[str, object], code: str, says: str
) -> None:
    call = master.stub.Session()
    await call.write(master_pb2.NodeReport(**report))  # type: ignore[arg-type]
    assert (await call.code()).name == code
    assert says in await call.details()


@pytest.mark.parametrize(
    "report",
    [
        {"hello": master_pb2.NodeHello(protocol_version=1, node_id="a")},
        {"delta": master_pb2.BlockEvents(root=b"short", tier=DRAM)},
        {"delta": master_pb2.BlockEvents(root=ROOT, tier=4, stored=keys(1))},  # type: ignore[arg-type]
        {"inventory": master_pb2.BlockEvents(root=ROOT, tier=DRAM, stored=b"x" * 33)},
        {"delta": master_pb2.BlockEvents(root=ROOT, tier=HBM, engine_id="e" * 257)},
        {"namespace": master_pb2.NamespaceReport(root=b"")},
    ],
    ids=lambda report: next(iter(report)),
)
async def test_I11_a_wrong_report_ends_the_session_and_nothing_else(
    master: Master, report: dict[str, object]
) -> None:
    node = await master.ready_node(dram=keys(0))
    bad = await master.node("node-b")
    await bad.report(**report)
    code, _ = await bad.status()
    assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    await node.delta(DRAM, stored=keys(1))
    await until(lambda: master.cluster.locations.entries == 2)


async def test_unknown_and_late_reports_are_ignored(master: Master) -> None:
    node = await master.ready_node(dram=keys(0))
    await node.report()
    await node.report(result=master_pb2.DirectiveResult(id=77))
    await node.delta(DRAM, stored=keys(1))
    await until(lambda: master.cluster.locations.entries == 2)


async def test_I7_a_session_without_a_hello_is_ended(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "HELLO_TIMEOUT_S", 0.05)
    node = FakeNode(master, "node-a")
    code, details = await node.status()
    assert (code, details) == (grpc.StatusCode.FAILED_PRECONDITION, "no hello within 0.05 s")
    assert await master.node()


async def test_a_session_that_says_nothing_is_harmless(master: Master) -> None:
    call = master.stub.Session()
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_I7_a_locate_of_too_many_keys_is_refused(master: Master) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await master.found(bytes(32 * 131_073))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await master.found(b"short")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_watcher_sees_what_happens_to_its_namespace(master: Master) -> None:
    other_spec = CacheSpec.raw("other", block_bytes=64)
    watch = master.stub.Watch(master_pb2.WatchRequest(root=ROOT))
    await watch.initial_metadata()
    node = await master.ready_node(dram=keys(0))
    await node.delta(DRAM, stored=keys(1), root=bytes(32))
    await node.namespace(other_spec)
    await node.delta(SSD, stored=keys(2))
    seen = [await watch.read(), await watch.read()]
    assert [(e.node_id, e.tier, e.stored) for e in seen] == [
        ("node-a", DRAM, keys(0)),
        ("node-a", SSD, keys(2)),
    ]
    node.drop()
    gone = [await watch.read(), await watch.read()]
    assert {(e.node_id, e.tier, e.cleared) for e in gone} == {
        ("node-a", DRAM, True),
        ("node-a", SSD, True),
    }
    watch.cancel()
    await until(lambda: len(master.cluster.watchers) == 0)


async def test_a_watch_of_a_root_that_is_none_is_refused(master: Master) -> None:
    watch = master.stub.Watch(master_pb2.WatchRequest(root=b"abc"))
    assert await watch.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_node_limit_or_namespace_limit_costs_memory_only(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.master.state.lmdb.NODES_MAX", 0)
    monkeypatch.setattr("kvstore.master.state.lmdb.NAMESPACES_MAX", 0)
    await master.ready_node(dram=keys(0))
    assert await master.found(keys(0)) == 1
    assert not master.cluster.namespaces


async def test_I9_a_refusal_right_behind_the_welcome_ends_the_stream(master: Master) -> None:
    hello = master_pb2.NodeHello(protocol_version=1, node_id="node-x", instance=1)
    wrong = master_pb2.BlockEvents(root=b"short", tier=DRAM)
    for _ in range(20):
        call = master.stub.Session()
        await call.write(master_pb2.NodeReport(hello=hello))
        await call.write(master_pb2.NodeReport(delta=wrong))
        async with asyncio.timeout(5):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
