import asyncio

import numpy as np
import numpy.typing as npt
import pytest
import torch
from kvstore.errors import InternalError, InvalidArgumentError, PreconditionError, UnavailableError
from kvstore_client import AsyncClient, CacheSpec, EndReason, Lease, Namespace, Tier
from kvstore_proto import common_pb2, node_pb2

from tests.client.fake_node import FakeNode, Request, Response

KEYS = [bytes([i]) * 32 for i in range(1, 7)]


@pytest.fixture
async def stored(ns: Namespace) -> npt.NDArray[np.uint8]:
    """Six blocks that the node has."""
    data = np.random.default_rng(3).integers(0, 256, (len(KEYS), 8192), dtype=np.uint8)
    assert (await ns.put(KEYS, data)).stored == len(KEYS)
    return data


class SlowNode:
    """Grants an Acquire when the test says so."""

    def __init__(self, node: FakeNode) -> None:
        self.node = node
        self.asked: Request | None = None
        node.answer = self.answer

    def answer(self, request: Request) -> list[Response] | None:
        if request.WhichOneof("request") != "acquire":
            return None
        self.asked = request
        return []

    async def granted(self, lease: Lease, first: int, count: int) -> None:
        """Grants as if the blocks had just arrived from SSD."""
        await self.node.wait_for("acquire")
        assert self.asked is not None
        response = self.node.own_answer(self.asked)[0]
        del response.granted.runs[first + count :]
        del response.granted.runs[:first]
        response.granted.generations = response.granted.generations[4 * first : 4 * (first + count)]
        for run in response.granted.runs:
            run.source = common_pb2.TIER_SSD
        lease.on_response(response)

    def end(self, lease: Lease, reason: EndReason) -> None:
        """Ends the Acquire."""
        end = node_pb2.End(reason=common_pb2.EndReason.ValueType(reason))
        lease.on_response(Response(end=end))


@pytest.mark.parametrize("held", [6, 4, 0])
async def test_the_end_may_come_with_the_last_blocks(
    ns: Namespace, node: FakeNode, stored: npt.NDArray[np.uint8], held: int
) -> None:
    def answer(request: Request) -> list[Response] | None:
        if request.WhichOneof("request") != "acquire" or not held:
            return None
        granted, end = node.own_answer(request)
        granted.granted.end.CopyFrom(end.end)
        return [granted]

    node.answer = answer
    keys = [*KEYS[:held], *(bytes([99]) * 32 for _ in range(held, 6))]
    async with ns.read(keys) as read:
        assert read.count == held
        assert read.reason == (EndReason.COMPLETE if held == 6 else EndReason.NEVER_STORED)
        assert [bytes(b) for b in read.blocks] == [b.tobytes() for b in stored[:held]]
    if held:
        await node.wait_for("release")


async def test_arrivals_come_in_chain_order(
    ns: Namespace, node: FakeNode, stored: npt.NDArray[np.uint8]
) -> None:
    slow = SlowNode(node)
    lease = await ns.acquire(KEYS)
    seen: list[tuple[int, int]] = []
    taken = asyncio.Event()

    async def follow() -> None:
        async for first, count in lease.arrivals():
            seen.append((first, count))
            assert bytes(lease.blocks[first]) == stored[first].tobytes()
            taken.set()

    following = asyncio.create_task(follow())
    await slow.granted(lease, 0, 2)
    assert await lease.wait(1) == 2
    await taken.wait()
    await slow.granted(lease, 2, 1)
    assert await lease.wait(3) == 3
    slow.end(lease, EndReason.CORRUPT)
    await following
    assert seen == [(0, 2), (2, 1)]
    assert lease.reason == EndReason.CORRUPT
    assert lease.sources[:3].tolist() == [Tier.SSD] * 3
    assert await lease.wait() == 3
    lease.release()


async def test_I9_what_is_not_here_at_the_deadline_counts_as_timed_out(
    ns: Namespace, node: FakeNode, stored: npt.NDArray[np.uint8]
) -> None:
    slow = SlowNode(node)
    lease = await ns.acquire(KEYS, timeout_s=0.2)
    await slow.granted(lease, 0, 2)
    assert await lease.wait() == 2
    assert lease.reason == EndReason.TIMED_OUT
    assert node.last("acquire").timeout_ms == 180
    await node.wait_for("release")
    release = node.last("release")
    assert (release.first, release.count) == (2, 4)
    assert bytes(lease.blocks[1]) == stored[1].tobytes()
    lease.release()
    await node.wait_for("release", 2)


async def test_a_node_that_grants_nothing_in_time_is_a_miss(ns: Namespace, node: FakeNode) -> None:
    node.ignore("acquire")
    async with ns.read(KEYS, timeout_s=0.05) as read:
        assert (read.count, read.reason) == (0, EndReason.TIMED_OUT)
    await node.wait_for("release")


async def test_with_timeout_0_the_node_waits_for_nothing(ns: Namespace, node: FakeNode) -> None:
    async with ns.read(KEYS, timeout_s=0) as read:
        assert (read.count, read.reason) == (0, EndReason.NEVER_STORED)
    assert node.last("acquire").timeout_ms == 0


async def test_release_in_parts_ends_the_hold_with_the_last(
    client: AsyncClient, ns: Namespace, node: FakeNode, stored: npt.NDArray[np.uint8]
) -> None:
    lease = await ns.acquire(KEYS)
    await lease.wait()
    lease.release(0, 2)
    assert bytes(lease.blocks[2]) == stored[2].tobytes()
    lease.release(2)
    with pytest.raises(PreconditionError, match="released"):
        lease.blocks[2]
    lease.release()
    await client.close()
    assert node.kinds().count("release") == 2


async def test_release_of_all_before_the_end_cancels(ns: Namespace, node: FakeNode) -> None:
    slow = SlowNode(node)
    lease = await ns.acquire(KEYS)
    lease.release()
    await node.wait_for("release")
    assert node.last("release").count == 0
    slow.end(lease, EndReason.RELEASED)
    assert await lease.wait() == 0
    assert lease.reason == EndReason.RELEASED


async def test_parts_released_before_the_end_close_at_the_end(
    ns: Namespace, node: FakeNode, stored: npt.NDArray[np.uint8]
) -> None:
    slow = SlowNode(node)
    lease = await ns.acquire(KEYS)
    await slow.granted(lease, 0, 2)
    lease.release(0, 2)
    assert bytes(lease.blocks[0][:0]) == b""
    slow.end(lease, EndReason.EVICTED)
    with pytest.raises(PreconditionError):
        lease.blocks[0]


async def test_I4_a_copy_from_a_reused_slot_is_discarded(
    ns: Namespace, node: FakeNode, stored: npt.NDArray[np.uint8]
) -> None:
    async with ns.read(KEYS) as read:
        assert read.still_valid()
        node.writer.bump_generations(np.array([node.slots[KEYS[3]]]))
        out = np.zeros_like(stored)
        with pytest.raises(UnavailableError, match="discarded"):
            read.copy_into(out)
        assert not read.still_valid()
        assert read.lease.still_valid(0, 3)
        assert read.lease.copy_into(out, 0, 3) == 3


async def test_views_are_the_pools_own_memory(ns: Namespace, stored: npt.NDArray[np.uint8]) -> None:
    async with ns.read(KEYS) as read:
        view = read.blocks[1]
        assert view.readonly
        assert [bytes(v) for v in read.blocks[4:]] == [row.tobytes() for row in stored[4:]]
        array = read.array(2, np.float32, (32, -1))
        assert array.shape == (32, 64)
        assert not array.flags.writeable
        assert array.tobytes() == stored[2].tobytes()
        tensor = read.tensor(3, torch.bfloat16, (64, 64))
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.uint8).flatten(), torch.from_numpy(stored[3]))
        assert read.tensor(3).shape == (8192,)
        assert read.sources.tolist() == [Tier.DRAM] * 6
        kept = np.frombuffer(read.blocks[5], dtype=np.uint8)
        with pytest.raises(IndexError):
            read.blocks[6]
    with pytest.raises(ValueError, match="released"):
        bytes(view)
    assert len(kept) == 8192
    with pytest.raises(PreconditionError, match="released"):
        read.array(0)


async def test_copies_go_to_one_buffer_or_to_one_a_block(
    ns: Namespace, stored: npt.NDArray[np.uint8]
) -> None:
    async with ns.read(KEYS) as read:
        pages = torch.zeros(6, 8192, dtype=torch.uint8)
        assert read.copy_into(list(pages)) == 6
        assert torch.equal(pages, torch.from_numpy(stored))
        whole = bytearray(6 * 8192)
        assert read.copy_into(whole) == 6
        assert whole == stored.tobytes()
        with pytest.raises(InvalidArgumentError, match="room for 5"):
            read.copy_into(bytearray(5 * 8192))
        with pytest.raises(InvalidArgumentError, match="read-only"):
            read.copy_into(bytes(6 * 8192))
        with pytest.raises(InvalidArgumentError, match="5 buffers"):
            read.copy_into([bytearray(8192)] * 5)
    assert read.lease.copy_into(bytearray(), 0, 0) == 0


async def test_get_stops_at_the_first_miss(ns: Namespace, stored: npt.NDArray[np.uint8]) -> None:
    out = np.zeros((8, 8192), dtype=np.uint8)
    got = await ns.get([*KEYS, b"z" * 32], out)
    assert (got.count, got.reason) == (6, EndReason.NEVER_STORED)
    assert np.array_equal(out[:6], stored)
    rows = [bytearray(8192) for _ in KEYS]
    assert (await ns.get(KEYS, rows)).count == 6
    assert rows == [row.tobytes() for row in stored]


async def test_blocks_smaller_than_their_slots(client: AsyncClient) -> None:
    spec = CacheSpec.raw("odd", block_bytes=5000)
    ns = await client.open_namespace(spec)
    data = np.random.default_rng(5).integers(0, 256, 6 * 5000, dtype=np.uint8)
    assert (await ns.put(KEYS, data)).stored == 6
    out = np.zeros_like(data)
    assert (await ns.get(KEYS, out)).count == 6
    assert np.array_equal(out, data)


@pytest.mark.parametrize(
    ("runs", "generations", "message"),
    [
        ([(1, 1, 0)], 4, "after block 0"),
        ([(0, 7, 0)], 28, "after block 0"),
        ([(0, 2, (1 << 20) - 8192)], 8, "outside of the pool"),
        ([(0, 2, 0)], 4, "generations"),
    ],
)
async def test_I11_grants_that_cannot_be_right_are_an_error(
    ns: Namespace,
    node: FakeNode,
    runs: list[tuple[int, int, int]],
    generations: int,
    message: str,
) -> None:
    def answer(request: Request) -> list[Response] | None:
        if request.WhichOneof("request") != "acquire":
            return None
        slots = [
            node_pb2.SlotRun(first=first, count=count, offset=offset, stride=8192)
            for first, count, offset in runs
        ]
        granted = node_pb2.Granted(runs=slots, generations=bytes(generations))
        return [Response(granted=granted)]

    node.answer = answer
    with pytest.raises(InternalError, match=message):
        async with ns.read(KEYS):
            raise AssertionError("nothing was granted")
    await node.wait_for("release")


async def test_a_refused_acquire_raises(client: AsyncClient, ns: Namespace, node: FakeNode) -> None:
    node.refuse("acquire", 3, "no such namespace")
    with pytest.raises(InvalidArgumentError, match="no such namespace"):
        async with ns.read(KEYS):
            raise AssertionError("nothing was granted")


async def test_a_cancelled_read_releases(ns: Namespace, node: FakeNode) -> None:
    node.ignore("acquire")

    async def read() -> None:
        async with ns.read(KEYS):
            raise AssertionError("nothing was granted")

    reading = asyncio.create_task(read())
    await node.wait_for("acquire")
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await node.wait_for("release")


@pytest.mark.parametrize(("leases", "messages"), [(1, 1), (3, 1), (256, 1), (300, 2)])
async def test_releases_go_with_the_next_request(
    ns: Namespace, node: FakeNode, stored: npt.NDArray[np.uint8], leases: int, messages: int
) -> None:
    held = [await ns.acquire(KEYS) for _ in range(leases)]
    for lease in held:
        assert await lease.wait() == len(KEYS)
    before = node.messages
    for lease in held:
        lease.release()
    later = await ns.acquire(KEYS)
    assert await later.wait() == len(KEYS)
    assert node.messages - before == messages
    kinds, ids = node.kinds()[-leases - 1 :], [r.release.acquire_id for r in node.requests]
    assert kinds == ["release"] * leases + ["acquire"]
    assert ids[-leases - 1 : -1] == [lease.id for lease in held]
    later.release()


async def test_release_works_from_another_thread(
    ns: Namespace, node: FakeNode, stored: npt.NDArray[np.uint8]
) -> None:
    lease = await ns.acquire(KEYS)
    await lease.wait()
    out = np.zeros_like(stored)
    assert await asyncio.to_thread(lease.copy_into, out) == 6
    await asyncio.to_thread(lease.release)
    await node.wait_for("release")
    assert np.array_equal(out, stored)


async def test_prefetch_says_how_many(ns: Namespace) -> None:
    assert await ns.prefetch(KEYS) == 6


async def test_keys_depend_on_salt_and_extras(ns: Namespace) -> None:
    plain = ns.keys(range(8))
    salted = ns.keys(range(8), cache_salt="a")
    adapter = ns.keys(range(8), cache_salt="a", extra={0: [b"lora"]})
    later = ns.keys(range(8), extra={1: [b"image"]})
    assert len({plain[0], salted[0], adapter[0]}) == 3
    assert later[0] == plain[0]
    assert later[1] != plain[1]
