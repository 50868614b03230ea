import asyncio

import numpy as np
import pytest
import torch
from kvstore.errors import (
    InternalError,
    InvalidArgumentError,
    PreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from kvstore_client import (
    AckLevel,
    AsyncClient,
    EndReason,
    Namespace,
    ReserveStatus,
    Shard,
    bulk,
)
from kvstore_proto import node_pb2

from tests.client.fake_node import POOL_BYTES, FakeNode, Request, Response

KEYS = [bytes([i]) * 32 for i in range(1, 7)]
BLOCK = 8192
FULL_AFTER = POOL_BYTES // BLOCK


def block(seed: int, nbytes: int = BLOCK) -> bytes:
    return np.random.default_rng(seed).bytes(nbytes)


async def read_one(ns: Namespace, key: bytes) -> bytes:
    async with ns.read([key]) as read:
        return bytes(read.blocks[0]) if read.count else b""


async def test_I2_what_is_not_committed_is_given_back(ns: Namespace, node: FakeNode) -> None:
    async with ns.write(KEYS) as write:
        write.put(0, block(0))
        await write.commit([0])
        write.put(1, block(1))
    await node.wait_for("abort")
    assert node.open_slots() == 0
    assert await read_one(ns, KEYS[0]) == block(0)
    assert await read_one(ns, KEYS[1]) == b""
    with pytest.raises(PreconditionError, match="released"):
        write._views[2]


async def test_arrays_tensors_and_views_all_fill_a_slot(ns: Namespace) -> None:
    floats = np.arange(BLOCK // 4, dtype=np.float32)
    halves = torch.arange(BLOCK // 2).to(torch.bfloat16).reshape(64, -1)
    async with ns.write(KEYS[:4]) as write:
        write.put(0, floats)
        write.put(1, halves)
        write.array(2, np.float32, (2, -1))[:] = 7
        write.slots[3][1][:] = block(3)
        assert [index for index, _ in write.slots] == [0, 1, 2, 3]
        assert (await write.commit()).tolist() == [AckLevel.MEMORY] * 4
        assert write.slots == []
        assert len(await write.commit()) == 0
        assert await write.abort() == 0
    assert await read_one(ns, KEYS[0]) == floats.tobytes()
    assert await read_one(ns, KEYS[1]) == halves.view(torch.uint8).numpy().tobytes()
    assert await read_one(ns, KEYS[2]) == np.full(BLOCK // 4, 7, np.float32).tobytes()
    assert await read_one(ns, KEYS[3]) == block(3)


@pytest.mark.parametrize("index", [-1, 0, 6])
async def test_only_open_slots_are_touched(ns: Namespace, index: int) -> None:
    async with ns.write(KEYS) as write:
        write.put(0, block(0))
        await write.commit([0])
        with pytest.raises(PreconditionError, match="no open slot"):
            write.put(index, block(1))
        with pytest.raises(PreconditionError, match="no open slot"):
            await write.commit([index])
        with pytest.raises(PreconditionError, match="no open slot"):
            write.array(index)


async def test_a_block_of_another_size_is_refused(ns: Namespace) -> None:
    async with ns.write(KEYS) as write:
        with pytest.raises(InvalidArgumentError, match="a block has 8192"):
            write.put(0, block(0, 100))


async def test_slots_can_be_given_back_one_by_one(ns: Namespace, node: FakeNode) -> None:
    async with ns.write(KEYS) as write:
        assert await write.abort([1, 2]) == 2
        assert node.open_slots() == 4
        assert [index for index, _ in write.slots] == [0, 3, 4, 5]


async def test_the_level_asked_for_is_the_level_reached(ns: Namespace) -> None:
    async with ns.write(KEYS[:1], level=AckLevel.SYNCED) as write:
        write.put(0, block(0))
        assert (await write.commit()).tolist() == [AckLevel.SYNCED]


async def test_shards_fill_their_part_of_each_block(ns: Namespace, node: FakeNode) -> None:
    async with ns.write(KEYS[:2], shard=Shard(1, 4)) as write:
        assert write.nbytes == BLOCK // 4
        write.put(0, block(1, BLOCK // 4))
        assert (node.last("reserve").shard_index, node.last("reserve").num_shards) == (1, 4)
        offset = int(write._offsets[0])
        assert offset % 4096 == BLOCK // 4
        assert node.pool[offset : offset + BLOCK // 4].tobytes() == block(1, BLOCK // 4)


@pytest.mark.parametrize("shard", [Shard(4, 4), Shard(-1, 2), Shard(0, 3)])
async def test_a_shard_that_does_not_exist_is_refused(ns: Namespace, shard: Shard) -> None:
    with pytest.raises(InvalidArgumentError, match="shard"):
        ns.write(KEYS, shard=shard)


async def test_I2_a_refused_or_cancelled_reserve_leaves_nothing(
    client: AsyncClient, ns: Namespace, node: FakeNode
) -> None:
    node.refuse("reserve", 8, "no room")
    with pytest.raises(ResourceExhaustedError, match="no room"):
        async with ns.write(KEYS):
            raise AssertionError("nothing was reserved")
    node.ignore("reserve")
    entering = asyncio.create_task(ns.write(KEYS).__aenter__())
    await node.wait_for("reserve", 2)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    await node.wait_for("abort", 2)
    assert not client._holds


@pytest.mark.parametrize(
    ("statuses", "run", "message"),
    [
        (b"\1", None, "1 statuses for 2 keys"),
        (b"\1\1", (0, 1, 0), "without saying where"),
        (b"\1\1", (0, 2, POOL_BYTES - BLOCK), "out of range"),
        (b"\1\1", (1, 2, 0), "out of range"),
    ],
)
async def test_I11_reservations_that_cannot_be_right_are_an_error(
    ns: Namespace,
    node: FakeNode,
    statuses: bytes,
    run: tuple[int, int, int] | None,
    message: str,
) -> None:
    def answer(request: Request) -> list[Response] | None:
        if request.WhichOneof("request") != "reserve":
            return None
        reserved = node_pb2.Reserved(statuses=statuses)
        if run is not None:
            reserved.generations = bytes(4 * run[1])
            reserved.runs.add(first=run[0], count=run[1], offset=run[2], stride=BLOCK)
        return [Response(reserved=reserved)]

    node.answer = answer
    with pytest.raises(InternalError, match=message):
        async with ns.write(KEYS[:2]):
            raise AssertionError("nothing was reserved")


async def test_I11_every_slot_has_a_generation(ns: Namespace, node: FakeNode) -> None:
    def answer(request: Request) -> list[Response] | None:
        if request.WhichOneof("request") != "reserve":
            return None
        (response,) = node.own_answer(request)
        response.reserved.generations = bytes(4)
        return [response]

    node.answer = answer
    with pytest.raises(InternalError, match="1 generations"):
        async with ns.write(KEYS[:2]):
            raise AssertionError("nothing was reserved")


async def test_I4_a_late_writer_copies_nothing_into_a_slot_of_another(
    ns: Namespace, node: FakeNode
) -> None:
    async with ns.write(KEYS[:4]) as write:
        write.put(0, block(0))
        node.writer.bump_generations(np.array([2 * BLOCK]))
        write.put(1, block(1))
        with pytest.raises(UnavailableError, match="slots"):
            write.put(2, block(2))
        with pytest.raises(UnavailableError, match="slots"):
            write.put_range(1, np.frombuffer(block(1, 3 * BLOCK), np.uint8))
        assert not node.pool[2 * BLOCK : 4 * BLOCK].any()
        write.put(3, block(3))


async def test_an_answer_to_a_commit_must_cover_all_blocks(ns: Namespace, node: FakeNode) -> None:
    node.answer = lambda request: (
        [Response(committed=node_pb2.Committed(levels=b"\1"))]
        if request.WhichOneof("request") == "commit"
        else None
    )
    async with ns.write(KEYS[:2]) as write:
        with pytest.raises(InternalError, match="1 levels for 2"):
            await write.commit()


async def test_put_in_many_parts(
    ns: Namespace, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PART_BYTES", 2 * BLOCK)
    monkeypatch.setattr(bulk, "SLICE_BYTES", BLOCK)
    keys = [i.to_bytes(32, "big") for i in range(15)]
    data = np.frombuffer(block(9, 15 * BLOCK), dtype=np.uint8)
    await ns.put(keys[3:4], data[3 * BLOCK : 4 * BLOCK])
    put = await ns.put(keys, data, parent=b"p" * 32)
    assert put.stored == 14
    assert put.statuses.tolist().count(ReserveStatus.HAVE) == 1
    assert put.levels[3] == 0
    reserves = [r.reserve for r in node.requests if r.HasField("reserve")][1:]
    assert [len(reserve.keys) // 32 for reserve in reserves] == [2] * 7 + [1]
    assert [reserve.parent for reserve in reserves] == [b"p" * 32, *keys[1:-1:2]]
    out = np.zeros_like(data)
    assert (await ns.get(keys, out)).count == 15
    assert np.array_equal(out, data)


async def test_put_takes_a_buffer_for_each_block(ns: Namespace) -> None:
    blocks = [block(i) for i in range(6)]
    await ns.put(KEYS[2:3], blocks[2])
    assert (await ns.put(KEYS, blocks)).stored == 5
    assert [await read_one(ns, key) for key in KEYS] == blocks


@pytest.mark.parametrize("data", [bytes(5 * BLOCK), [bytes(BLOCK)] * 5, [bytes(BLOCK - 1)] * 6])
async def test_put_needs_the_bytes_of_every_block(ns: Namespace, data: object) -> None:
    with pytest.raises(InvalidArgumentError, match="6 of 8192 are needed"):
        await ns.put(KEYS, data)


async def test_put_stops_where_there_is_no_space(
    ns: Namespace, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PART_BYTES", 10 * BLOCK)
    count = FULL_AFTER + 30
    keys = [i.to_bytes(32, "big") for i in range(count)]
    put = await ns.put(keys, np.zeros(count * BLOCK, dtype=np.uint8))
    assert put.stored == FULL_AFTER
    assert (put.statuses[FULL_AFTER:] == ReserveStatus.FULL).all()
    async with ns.read(keys) as read:
        assert (read.count, read.reason) == (FULL_AFTER, EndReason.NEVER_STORED)
    assert node.open_slots() == 0


async def test_a_put_that_fails_half_way_leaves_no_slot(
    client: AsyncClient, ns: Namespace, node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PART_BYTES", BLOCK)

    def answer(request: Request) -> list[Response] | None:
        if request.WhichOneof("request") == "reserve" and node.kinds().count("reserve") == 3:
            return node.error(8, "no room")
        return None

    node.answer = answer
    with pytest.raises(ResourceExhaustedError, match="no room"):
        await ns.put(KEYS, bytes(6 * BLOCK))
    assert not client._holds
    await client.close()
    assert node.open_slots() == 0


async def test_I1_a_block_whose_bytes_changed_is_not_stored(ns: Namespace, node: FakeNode) -> None:
    async with ns.write(KEYS[:2]) as write:
        write.put(0, block(0))
        write.put(1, block(1))
        node.pool[int(write._offsets[1])] ^= 1
        assert (await write.commit()).tolist() == [AckLevel.MEMORY, 0]
    assert await read_one(ns, KEYS[1]) == b""


async def test_a_busy_block_is_left_to_the_other_writer(ns: Namespace, node: FakeNode) -> None:
    def answer(request: Request) -> list[Response] | None:
        if request.WhichOneof("request") != "reserve":
            return None
        (response,) = node.own_answer(request)
        response.reserved.statuses = bytes([1, ReserveStatus.BUSY, 1])
        return [response]

    node.answer = answer
    put = await ns.put(KEYS[:3], block(0, 3 * BLOCK))
    assert put.levels.tolist() == [AckLevel.MEMORY, 0, AckLevel.MEMORY]
