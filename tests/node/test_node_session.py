"""What a client and a node say to each other, message by message."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest
from kvstore.core.effects import Matched, Reply
from kvstore.core.spec import CacheSpec
from kvstore.core.types import EndReason, Tier
from kvstore.node import session as session_module
from kvstore_proto import common_pb2, node_pb2

from tests.node.rig import (
    BLOCK_BYTES,
    BUSY,
    HAVE,
    MEMORY,
    SLOT,
    SYNCED,
    LocalNode,
    RawSession,
    checksum,
    data_of,
    generations,
    hello_message,
    keys_of,
    until,
)


async def test_I1_block_comes_back_as_it_was(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    keys = keys_of(20)
    assert await session.put(keys) == bytes([MEMORY] * 20)
    reader = session.directory()
    assert reader.match(b"".join(keys)).tolist() == [Tier.DRAM] * 20
    request_id, granted, end = await session.acquire(keys)
    assert (end.granted, end.reason) == (20, EndReason.COMPLETE)
    slots = [slot for part in granted for slot in session.slots(part.runs)]
    assert [bytes(view) for _, view in slots] == [data_of(key) for key in keys]
    assert sum(len(part.runs) for part in granted) == 1, "neighbours make one run"
    assert len(generations(granted)) == 20
    assert granted[-1].HasField("end"), "one message says all"
    assert (await session.stats()).pinned_blocks == 20
    await session.send(release=node_pb2.Release(acquire_id=request_id, first=0, count=5))
    await session.send(release=node_pb2.Release(acquire_id=request_id))
    assert (await session.stats()).pinned_blocks == 0
    await session.goodbye()
    await node.idle()


async def test_a_miss_has_a_reason(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    keys = keys_of(8)
    await session.put(keys[:5])
    end = await session.check(keys)
    assert (end.granted, end.reason) == (5, EndReason.NEVER_STORED)
    matched = (
        await session.call(
            match=node_pb2.Match(namespace_id=session.namespace, keys=b"".join(keys))
        )
    ).matched
    assert matched.tiers == bytes([Tier.DRAM] * 5)


async def test_a_request_carries_releases_which_come_first(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    keys = keys_of(3)
    await session.put(keys)
    acquire = node_pb2.Acquire(namespace_id=session.namespace, keys=b"".join(keys))
    first, second = [await session.send(acquire=acquire) for _ in range(2)]
    for lease in (first, second):
        await session.receive(lease)
    released = [node_pb2.Release(acquire_id=lease) for lease in (first, second, 12345)]
    third = await session.send(acquire=acquire, released=released)
    await session.receive(third)
    core = node.node.core
    assert core.pinned_blocks() == 3
    assert core.counters["releases_of_nothing"] == 1
    last = node_pb2.Release(acquire_id=third)
    await session.send(release=node_pb2.Release(acquire_id=54321), released=[last])
    await until(lambda: core.counters["releases_of_nothing"] == 2)
    assert core.pinned_blocks() == 0


async def test_a_second_hello_carries_no_releases(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    await session.put(keys_of(1))
    acquire = node_pb2.Acquire(namespace_id=session.namespace, keys=b"".join(keys_of(1)))
    lease = await session.send(acquire=acquire)
    await session.receive(lease)
    released = [node_pb2.Release(acquire_id=lease)]
    response = await session.call(hello=node_pb2.Hello(protocol_version=2), released=released)
    assert "one Hello" in response.error.message
    assert node.node.core.pinned_blocks() == 1


async def test_I7_releases_in_one_request_are_bounded(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    await session.put(keys_of(1))
    match = node_pb2.Match(namespace_id=session.namespace, keys=b"".join(keys_of(1)))
    many = [node_pb2.Release(acquire_id=i) for i in range(257)]
    response = await session.call(match=match, released=many)
    assert "257 releases" in response.error.message
    assert (await session.call(match=match, released=many[1:])).matched.tiers == bytes([2])
    assert node.node.core.counters["releases_of_nothing"] == 256


async def test_I2_block_is_invisible_until_committed(node: LocalNode) -> None:
    one, two = await RawSession.open(node.address), await RawSession.open(node.address)
    keys = keys_of(4)
    request_id, reserved = await one.reserve(keys)
    assert reserved.statuses == bytes([SLOT] * 4)
    assert (await two.check(keys, timeout_ms=0)).granted == 0
    assert (await two.reserve(keys))[1].statuses == bytes([BUSY] * 4)
    aborted = (await one.call(abort=node_pb2.Abort(reserve_id=request_id, indices=[3]))).aborted
    assert aborted.count == 1
    assert (await one.call(abort=node_pb2.Abort(reserve_id=request_id))).aborted.count == 3
    assert node.usage().pending_bytes == 0
    await two.put(keys)
    assert (await one.reserve(keys))[1].statuses == bytes([HAVE] * 4)


async def test_shards_make_a_block_together(node: LocalNode) -> None:
    one, two = await RawSession.open(node.address), await RawSession.open(node.address)
    keys = keys_of(2)
    for rank, session in enumerate((one, two)):
        request_id, reserved = await session.reserve(keys, shard_index=rank, num_shards=2)
        sums = b""
        for index, view in session.slots(reserved.runs):
            half = slice(rank * BLOCK_BYTES // 2, (rank + 1) * BLOCK_BYTES // 2)
            view[half] = data_of(keys[index])[half]
            sums += checksum(view[half])
            view.release()
        assert (await one.check(keys, timeout_ms=0)).granted == 0
        commit = node_pb2.Commit(reserve_id=request_id, indices=[0, 1], checksums=sums)
        await session.call(commit=commit)
    assert (await two.check(keys)).granted == 2


async def test_blocks_come_back_from_ssd(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    keys = keys_of(32)
    assert await session.put(keys, level=SYNCED) == bytes([SYNCED] * 32)
    effects, removal = node.node.core.evict(Tier.DRAM, b"", 0, False, node.node.driver.now())
    node.node.driver.apply(effects)
    assert removal.blocks == 32
    assert session.directory().match(b"".join(keys)).tolist() == [Tier.SSD] * 32
    assert (await session.check(keys, timeout_ms=0)).reason == EndReason.TIMED_OUT
    prefetch = node_pb2.Prefetch(namespace_id=session.namespace, keys=b"".join(keys[:8]))
    assert (await session.call(prefetch=prefetch)).prefetched.started > 0
    _, granted, end = await session.acquire(keys)
    assert (end.granted, end.reason) == (32, EndReason.COMPLETE)
    assert {run.source for part in granted for run in part.runs} <= {Tier.SSD, Tier.DRAM}
    await session.check(keys)
    await session.goodbye()
    await node.idle()


async def test_four_times_the_dram_loses_nothing(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    count = 3 * (4 << 20) // BLOCK_BYTES
    chains = [keys_of(64, seed) for seed in range(count // 64)]
    for chain in chains:
        assert await session.put(chain, timeout_ms=10_000) == bytes([MEMORY] * 64)
    for chain in chains:
        assert (await session.check(chain)).reason == EndReason.COMPLETE
    await session.goodbye()
    await node.idle()


async def test_without_ssd_the_level_is_memory(make_node: Callable[..., LocalNode]) -> None:
    node = make_node(ssd=0)
    await node.start()
    session = await RawSession.open(node.address)
    assert await session.put(keys_of(3), level=SYNCED) == bytes([MEMORY] * 3)
    await session.goodbye()


BAD_REQUESTS: dict[str, tuple[dict[str, Any], grpc.StatusCode, str]] = {
    "zero-id": (
        {"request_id": 0, "match": node_pb2.Match()},
        grpc.StatusCode.INVALID_ARGUMENT,
        "id",
    ),
    "unknown-kind": ({}, grpc.StatusCode.INVALID_ARGUMENT, "kind"),
    "second-hello": (
        {"hello": node_pb2.Hello(protocol_version=1)},
        grpc.StatusCode.FAILED_PRECONDITION,
        "one Hello",
    ),
    "no-namespace": (
        {"acquire": node_pb2.Acquire(namespace_id=99, keys=bytes(32))},
        grpc.StatusCode.NOT_FOUND,
        "99",
    ),
    "odd-keys": (
        {"acquire": node_pb2.Acquire(namespace_id=1, keys=bytes(33))},
        grpc.StatusCode.INVALID_ARGUMENT,
        "33",
    ),
    "too-many-keys": (
        {"acquire": node_pb2.Acquire(namespace_id=1, keys=bytes(32 * 100_000))},
        grpc.StatusCode.INVALID_ARGUMENT,
        "keys",
    ),
    "bad-level": (
        {"commit": node_pb2.Commit(reserve_id=1, level=77)},  # type: ignore[arg-type]
        grpc.StatusCode.INVALID_ARGUMENT,
        "77",
    ),
    "commit-of-nothing": (
        {"commit": node_pb2.Commit(reserve_id=1, indices=[0], checksums=bytes(8))},
        grpc.StatusCode.NOT_FOUND,
        "",
    ),
    "hbm-without-engine": (
        {"hbm_events": node_pb2.HbmEvents(namespace_id=1, stored=bytes(32))},
        grpc.StatusCode.INVALID_ARGUMENT,
        "engine_id",
    ),
    "empty-spec": (
        {"open_namespace": node_pb2.OpenNamespace()},
        grpc.StatusCode.INVALID_ARGUMENT,
        "block_tokens",
    ),
    "block-over-pool": (
        {
            "open_namespace": node_pb2.OpenNamespace(
                spec=common_pb2.CacheSpec(
                    format_version=1, block_tokens=64, block_bytes=1 << 29, attention="raw"
                )
            )
        },
        grpc.StatusCode.INVALID_ARGUMENT,
        "536870912",
    ),
    "other-tenant": (
        {
            "open_namespace": node_pb2.OpenNamespace(
                tenant="else",
                spec=common_pb2.CacheSpec(format_version=1, block_tokens=64, block_bytes=4096),
            )
        },
        grpc.StatusCode.INVALID_ARGUMENT,
        "else",
    ),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
async def test_I11_bad_request_is_answered_and_the_session_goes_on(
    node: LocalNode, name: str
) -> None:
    request, status, part = BAD_REQUESTS[name]
    session = await RawSession.open(node.address)
    response = await session.receive(await session.send(**request))
    assert response.WhichOneof("response") == "error", response
    assert response.error.code == status.value[0], response.error.message
    assert part in response.error.message
    await session.put(keys_of(2))
    assert (await session.check(keys_of(2))).granted == 2


@pytest.mark.parametrize(
    ("first", "status", "part"),
    [
        (
            {"hello": hello_message(protocol_version=3)},
            grpc.StatusCode.FAILED_PRECONDITION,
            "protocol version 3",
        ),
        ({"match": node_pb2.Match()}, grpc.StatusCode.FAILED_PRECONDITION, "must be Hello"),
        ({"hello": hello_message(client_id="")}, grpc.StatusCode.INVALID_ARGUMENT, "client_id"),
        ({"hello": hello_message(name="x" * 300)}, grpc.StatusCode.INVALID_ARGUMENT, "256"),
    ],
)
async def test_a_client_that_is_not_let_in(
    node: LocalNode, first: dict[str, Any], status: grpc.StatusCode, part: str
) -> None:
    session = RawSession(node.address)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await session.call(**first)
    assert error.value.code() is status
    assert part in (error.value.details() or "")
    assert node.node.clients.open_count == 0


async def test_silence_is_not_a_hello(node: LocalNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "HELLO_TIMEOUT_S", 0.05)
    session = RawSession(node.address)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await session.receive(1)
    assert error.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_I7_sessions_are_bounded(make_node: Callable[..., LocalNode]) -> None:
    node = make_node(sessions_max=2)
    await node.start()
    sessions = [await RawSession.open(node.address, namespace=False) for _ in range(2)]
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await RawSession.open(node.address, namespace=False)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await sessions[0].goodbye()
    await until(lambda: node.node.clients.open_count == 1)
    await RawSession.open(node.address, namespace=False)


async def test_I7_client_that_reads_nothing_is_ended(
    node: LocalNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "OUTBOX_PAUSE", 4)
    monkeypatch.setattr(session_module, "OUTBOX_MAX", 8)
    session = await RawSession.open(node.address)
    client_id, sink = next(iter(node.node.driver.sinks.items()))
    for _ in range(9):
        sink(Reply(client_id, 1, Matched(bytes(8))))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await session.receive(7)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: node.node.clients.open_count == 0)


async def test_a_bug_is_reported_and_the_session_goes_on(
    node: LocalNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await RawSession.open(node.address)

    def fail(*_arguments: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(node.node.core, "match", fail)
        response = await session.call(match=node_pb2.Match(namespace_id=1))
    assert response.error.code == grpc.StatusCode.INTERNAL.value[0]
    await session.put(keys_of(1))


async def test_namespaces_of_two_specs_share_the_pool(node: LocalNode) -> None:
    session = await RawSession.open(node.address)
    other = await RawSession.open(
        node.address, spec=CacheSpec.raw("other", block_bytes=BLOCK_BYTES)
    )
    assert session.root != other.root
    await session.put(keys_of(4, 1))
    await other.put(keys_of(4, 2))
    assert (await session.check(keys_of(4, 1))).granted == 4
    assert (await other.check(keys_of(4, 2))).granted == 4
