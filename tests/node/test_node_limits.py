"""I7 at the node's port: how large a message may be, and what answers that nobody reads take."""

import asyncio
import gc
from typing import Any

import grpc
import pytest
from kvstore.core.effects import Granted, Matched, Reply, Reserved
from kvstore.core.types import SlotRun, Tier
from kvstore.node import session as session_module
from kvstore.node.session import Outbox
from kvstore.node.translate import answer_bytes
from kvstore_proto import node_pb2

from tests.node.rig import LocalNode, RawSession, keys_of, until

KEYS_MAX = 1 << 16
NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_I7_the_largest_requests_fit(node: LocalNode) -> None:
    session = await RawSession.open(node.address, engine_id="e")
    keys = b"".join(number.to_bytes(32, "little") for number in range(1, KEYS_MAX + 1))
    matched = await session.call(match=node_pb2.Match(namespace_id=session.namespace, keys=keys))
    assert matched.HasField("matched")
    commit = node_pb2.Commit(reserve_id=999, indices=range(KEYS_MAX), checksums=bytes(8 * KEYS_MAX))
    assert (await session.call(commit=commit)).error.code == NOT_FOUND
    too_many = keys + b"x" * 32
    answer = await session.call(match=node_pb2.Match(namespace_id=1, keys=too_many))
    assert "send 65536 at most" in answer.error.message
    for stored, removed in ((too_many, b""), (keys, b"x" * 32)):
        events = node_pb2.HbmEvents(namespace_id=session.namespace, stored=stored, removed=removed)
        answer = await session.call(hbm_events=events)
        assert answer.error.code == INVALID_ARGUMENT
    assert not node.node.hbm.roots()
    await session.goodbye()


@pytest.mark.parametrize(
    "request_",
    [
        {"commit": node_pb2.Commit(reserve_id=999, indices=bytes(5 << 20))},
        {"abort": node_pb2.Abort(reserve_id=999, indices=bytes(5 << 20))},
        {"match": node_pb2.Match(namespace_id=1, keys=bytes(5 << 20))},
        {"hbm_events": node_pb2.HbmEvents(namespace_id=1, stored=bytes(5 << 20))},
    ],
    ids=["commit", "abort", "match", "hbm_events"],
)
async def test_I7_a_message_that_no_client_needs_is_refused_before_it_is_read(
    node: LocalNode, request_: dict[str, Any]
) -> None:
    session = await RawSession.open(node.address, engine_id="e")
    other = await RawSession.open(node.address)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await session.call(**request_)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await other.put(keys_of(1))
    await other.goodbye()


async def test_I7_answers_that_nobody_reads_are_bounded_in_bytes(
    node: LocalNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "OUTBOX_PAUSE_BYTES", 1000)
    monkeypatch.setattr(session_module, "OUTBOX_BYTES_MAX", 4000)
    session = await RawSession.open(node.address)
    client_id, sink = next(iter(node.node.driver.sinks.items()))
    for _ in range(5):
        sink(Reply(client_id, 1, Matched(bytes(900))))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await session.receive(7)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: node.node.clients.open_count == 0)


async def test_I7_requests_are_not_read_while_their_answers_take_much() -> None:
    class Context:
        def __init__(self) -> None:
            self.may_write = asyncio.Event()

        async def write(self, message: object) -> None:
            await self.may_write.wait()

    context = Context()
    outbox = Outbox(context, lambda error: pytest.fail(str(error)))
    writer = asyncio.create_task(outbox.write_all())
    for _ in range(5):
        outbox.put_reply(Reply(1, 1, Matched(bytes(1 << 20))))
    room = asyncio.create_task(outbox.room())
    await asyncio.sleep(0)
    assert not room.done()
    context.may_write.set()
    await room
    await outbox.stop(writer)


def test_an_answer_of_many_runs_counts_for_them() -> None:
    run = SlotRun(0, 1, 0, 4096, Tier.DRAM)
    assert answer_bytes(Granted([run] * 1000, bytes(4000))) > 50_000
    assert answer_bytes(Reserved(bytes(10), [run] * 1000, bytes(4000))) > 50_000


async def test_I11_a_write_to_a_stream_that_its_client_ended_is_no_noise() -> None:
    noise: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: noise.append(context))
    broken = asyncio.Event()

    class Context:
        async def write(self, message: object) -> None:
            await broken.wait()
            raise asyncio.InvalidStateError("RPC already finished.")

    outbox = Outbox(Context(), lambda _error: None)
    writer = asyncio.create_task(outbox.write_all())
    outbox.put(node_pb2.SessionResponse(id=1))
    stopping = asyncio.create_task(outbox.stop(writer))
    await asyncio.sleep(0)
    stopping.cancel()  # as gRPC does with the handler of a call that its client cancelled
    await asyncio.wait({stopping})
    broken.set()
    await asyncio.wait({writer})
    del writer, stopping
    gc.collect()
    await asyncio.sleep(0)
    assert not noise
