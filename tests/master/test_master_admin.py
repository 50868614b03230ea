"""The Admin service, against fake nodes."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from kvstore.core.keys import block_keys, join_keys, namespace_root
from kvstore.core.spec import CacheSpec
from kvstore_proto import admin_pb2, common_pb2, master_pb2

from tests.master.rig import DRAM, HBM, ROOT, SPEC, SSD, Master, keys, until

OTHER = CacheSpec.raw("other", block_bytes=64, block_tokens=4)


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), str(caught.value.details())


async def test_status_sums_over_the_ready_nodes(master: Master) -> None:
    for name in ("node-a", "node-b"):
        node = await master.ready_node(name, dram=keys(0), ssd=keys(0, 1))
        await node.heartbeat(capacity_bytes=100, free_bytes=60, live_bytes=40, blocks=1)
    nodes = master.cluster.members.nodes
    await until(lambda: all(n.tiers for n in nodes.values()))
    await master.node("node-c")
    (await master.node("node-d")).drop()
    await until(lambda: nodes["node-d"].state.value == "lost")
    status = await master.admin.Status(admin_pb2.StatusRequest())
    assert (status.nodes_ready, status.nodes_lost, status.namespaces) == (2, 1, 1)
    assert (status.indexed_blocks, status.cluster_epoch, status.leader) == (6, 1, True)
    assert list(status.tiers) == [
        common_pb2.TierUsage(tier=DRAM, capacity_bytes=200, free_bytes=120, live_bytes=80, blocks=2)
    ]
    listed = (await master.admin.ListNodes(admin_pb2.ListNodesRequest())).nodes
    assert [(n.node_id, n.state, n.sessions) for n in listed] == [
        ("node-a", "ready", 3),
        ("node-b", "ready", 3),
        ("node-c", "syncing", 0),
        ("node-d", "lost", 0),
    ]


async def test_blocks_are_listed_in_pages(master: Master) -> None:
    node = await master.ready_node(dram=keys(*range(5)), ssd=keys(0))
    await node.delta(HBM, stored=keys(3), engine_id="engine-1")
    await until(lambda: master.cluster.locations.entries == 7)
    seen, after, pages = [], b"", 0
    while True:
        page = await master.admin.ListBlocks(admin_pb2.ListBlocksRequest(limit=2, after=after))
        seen += [(b.key[-1], b.tier, b.engine_id, b.bytes) for b in page.blocks]
        pages += 1
        if not (after := page.next):
            break
    assert seen == [
        (0, DRAM, "", 4096),
        (0, SSD, "", 4096),
        (1, DRAM, "", 4096),
        (2, DRAM, "", 4096),
        (3, HBM, "engine-1", 4096),
        (3, DRAM, "", 4096),
        (4, DRAM, "", 4096),
    ]
    assert pages == 4


async def test_blocks_can_be_asked_for_by_tier_node_and_namespace(master: Master) -> None:
    node = await master.ready_node(dram=keys(0), ssd=keys(1))
    await node.namespace(OTHER)
    await node.delta(SSD, root=namespace_root(OTHER), stored=keys(2))
    await master.ready_node("node-b", dram=keys(3))
    await until(lambda: master.cluster.locations.entries == 4)

    async def listed(**fields: Any) -> list[int]:
        answer = await master.admin.ListBlocks(admin_pb2.ListBlocksRequest(**fields))
        return [block.key[-1] for block in answer.blocks]

    assert await listed() == [0, 1, 2, 3]
    assert await listed(tier=SSD) == [1, 2]
    assert await listed(node_id="node-b") == [3]
    assert await listed(root=ROOT, node_id="node-a") == [0, 1]
    code, says = await refusal(master.admin.ListBlocks(admin_pb2.ListBlocksRequest(node_id="x")))
    assert (code, says) == (
        grpc.StatusCode.NOT_FOUND,
        "no node 'x'; `kvstore nodes` lists them",
    )
    code, _ = await refusal(master.admin.ListBlocks(admin_pb2.ListBlocksRequest(limit=10_001)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    code, _ = await refusal(master.admin.ListBlocks(admin_pb2.ListBlocksRequest(root=bytes(32))))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_a_prompt_is_located_by_its_tokens(master: Master) -> None:
    tokens = list(range(18))
    chain = block_keys(ROOT, tokens, SPEC.block_tokens)
    await master.ready_node(dram=join_keys(chain[:2]), ssd=join_keys(chain[:3]))
    answer = await master.admin.LocatePrompt(admin_pb2.LocatePromptRequest(tokens=tokens))
    assert (answer.blocks, answer.found, answer.block_tokens) == (4, 3, 4)
    assert [(r.first, r.count, r.tier) for r in answer.runs] == [(0, 2, DRAM), (0, 3, SSD)]
    salted = admin_pb2.LocatePromptRequest(root=ROOT, tokens=tokens, cache_salt="pepper")
    assert (await master.admin.LocatePrompt(salted)).found == 0


async def test_a_prompt_needs_one_namespace(master: Master) -> None:
    request = admin_pb2.LocatePromptRequest(tokens=[1])
    code, says = await refusal(master.admin.LocatePrompt(request))
    assert (code, "no namespace yet" in says) == (grpc.StatusCode.NOT_FOUND, True)
    node = await master.ready_node()
    await node.namespace(OTHER)
    await until(lambda: len(master.cluster.namespaces) == 2)
    code, says = await refusal(master.admin.LocatePrompt(request))
    assert (code, "no namespace has a block" in says) == (grpc.StatusCode.NOT_FOUND, True)
    await node.delta(DRAM, root=namespace_root(OTHER), stored=keys(1))
    await until(lambda: master.cluster.locations.entries == 1)
    assert (await master.admin.LocatePrompt(request)).found == 0
    await node.delta(DRAM, stored=keys(2))
    await until(lambda: master.cluster.locations.entries == 2)
    code, says = await refusal(master.admin.LocatePrompt(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert ROOT.hex()[:12] in says


async def test_evict_asks_the_nodes_and_a_limit_holds_for_all_together(master: Master) -> None:
    first = await master.ready_node("node-a")
    second = await master.ready_node("node-b")
    request = admin_pb2.EvictRequest(tier=DRAM, bytes=100, keys=keys(1), drop=True)
    call = asyncio.ensure_future(master.admin.Evict(request))
    order = await first.answer(blocks=2, bytes=60, pinned=1)
    assert order.evict == master_pb2.EvictBlocks(tier=DRAM, keys=keys(1), bytes=100, drop=True)
    order = await second.answer(blocks=1, bytes=50)
    assert order.evict.bytes == 40
    assert await call == admin_pb2.RemovalResponse(blocks=3, bytes=110, pinned=1, nodes=2)


async def test_evict_stops_asking_when_enough_is_free(master: Master) -> None:
    first = await master.ready_node("node-a")
    await master.ready_node("node-b")
    call = asyncio.ensure_future(master.admin.Evict(admin_pb2.EvictRequest(tier=SSD, bytes=100)))
    await first.answer(blocks=1, bytes=100)
    assert (await call).nodes == 1


async def test_a_node_that_fails_or_goes_is_named(master: Master) -> None:
    failing = await master.ready_node("node-a")
    going = await master.ready_node("node-b")
    silent = await master.ready_node("node-c")
    (await master.node("node-d")).drop()
    await until(lambda: master.cluster.members.nodes["node-d"].state.value == "lost")
    call = asyncio.ensure_future(
        master.admin.Purge(admin_pb2.PurgeRequest(root=ROOT), timeout=20.0)
    )
    assert (await failing.answer(blocks=1, error="disk on fire")).purge.root == ROOT
    await going.directive()
    going.drop()
    await silent.directive()
    silent.drop()
    answer = await call
    assert list(answer.errors) == [
        "node-a: disk on fire",
        "node-b: the node's connection ended",
        "node-c: the node's connection ended",
        "node-d: not connected; what it holds on SSD stays as it is",
    ]
    assert (answer.nodes, answer.blocks) == (0, 1)


async def test_I9_no_call_outlives_its_deadline(
    master: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.master.admin.DIRECTIVE_TIMEOUT_S", 0.05)
    await master.ready_node()
    answer = await master.admin.Evict(admin_pb2.EvictRequest(tier=DRAM))
    assert list(answer.errors) == ["node-a: no answer within 0.05 s"]


async def test_purge_makes_later_misses_say_so(master: Master) -> None:
    node = await master.ready_node(dram=keys(0))
    call = asyncio.ensure_future(master.admin.Purge(admin_pb2.PurgeRequest(all=True)))
    assert (await node.answer(blocks=1)).purge.root == b""
    await call
    await node.delta(DRAM, removed=keys(0))
    await until(lambda: not master.cluster.locations.places_of(keys(0)))
    assert master.cluster.locations.locate(keys(0)).reason.name == "PURGED"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (admin_pb2.PurgeRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (admin_pb2.PurgeRequest(root=bytes(32), all=True), grpc.StatusCode.INVALID_ARGUMENT),
        (admin_pb2.PurgeRequest(root=bytes(32)), grpc.StatusCode.NOT_FOUND),
        (admin_pb2.PurgeRequest(root=b"abc"), grpc.StatusCode.INVALID_ARGUMENT),
        (admin_pb2.EvictRequest(tier=HBM), grpc.StatusCode.INVALID_ARGUMENT),
        (admin_pb2.EvictRequest(tier=DRAM, keys=b"abc"), grpc.StatusCode.INVALID_ARGUMENT),
        (admin_pb2.EvictRequest(tier=DRAM, node_id="x"), grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_removals_that_make_no_sense_are_refused(
    master: Master, request_: Any, code: grpc.StatusCode
) -> None:
    name = type(request_).__name__.removesuffix("Request")
    assert (await refusal(getattr(master.admin, name)(request_)))[0] is code


async def test_version(master: Master) -> None:
    version = await master.admin.Version(admin_pb2.VersionRequest())
    assert (version.version, version.protocol_version) == ("0.1.0", 1)


async def test_a_node_that_reads_no_directives_is_ended(master: Master) -> None:
    node = await master.ready_node()
    link = master.cluster.members.nodes["node-a"].link
    assert link is not None
    for _ in range(2000):
        link.send(master_pb2.Directive(resync=master_pb2.Resync()))
    code, why = await node.status()
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "does not read its directives" in why


async def test_I11_odd_numbers_of_a_node_break_no_answer(
    master: Master, caplog: pytest.LogCaptureFixture
) -> None:
    most = 2**64 - 1
    nodes = [await master.ready_node(name) for name in ("node-a", "node-b")]
    usage = common_pb2.TierUsage(
        tier=DRAM, capacity_bytes=most, free_bytes=most, live_bytes=5, blocks=most
    )
    odd = common_pb2.TierUsage(tier=77, capacity_bytes=1)  # type: ignore[arg-type]
    for node in nodes:
        for _ in range(2):
            await node.report(heartbeat=master_pb2.Heartbeat(tiers=[usage, odd, usage], sessions=1))
    await until(lambda: all(n.sessions for n in master.cluster.members.connected()))
    status = await master.admin.Status(admin_pb2.StatusRequest())
    assert [(t.tier, t.capacity_bytes, t.live_bytes) for t in status.tiers] == [(DRAM, most, 10)]
    listed = await master.admin.ListNodes(admin_pb2.ListNodesRequest())
    assert [[t.tier for t in n.tiers] for n in listed.nodes] == [[DRAM], [DRAM]]
    assert caplog.text.count("node node-a reports the space of tiers 2, 77, 2") == 1
    purge = master.admin.Purge(admin_pb2.PurgeRequest(all=True))
    for node in nodes:
        await node.answer(blocks=most, bytes=most, pinned=most)
    answer = await purge
    assert (answer.blocks, answer.bytes, answer.pinned, answer.nodes) == (most, most, most, 2)


async def test_a_prompt_of_unknown_or_very_small_blocks_is_refused(master: Master) -> None:
    node = await master.node()
    await node.report(namespace=master_pb2.NamespaceReport(root=b"u" * 32))
    small = CacheSpec.raw("small", block_bytes=4096, block_tokens=1)
    await node.namespace(small)
    await until(lambda: len(master.cluster.namespaces) == 2)
    for root, tokens, code, why in (
        (b"u" * 32, 8, grpc.StatusCode.FAILED_PRECONDITION, "no node has told how many tokens"),
        (namespace_root(small), 131_073, grpc.StatusCode.INVALID_ARGUMENT, "131073 blocks of 1"),
    ):
        request = admin_pb2.LocatePromptRequest(root=root, tokens=[1] * tokens)
        status, details = await refusal(master.admin.LocatePrompt(request))
        assert status is code
        assert why in details
