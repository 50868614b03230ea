"""F13: slow readers against eviction and reuse of the slots that they copy from.

A copy here takes the first half of its blocks, lets the writer go on, and takes the second half.
Under a live lease every byte is right. A reader that lost its session copies from slots that are
given to other blocks meanwhile: it must discard. The control, readers that release before they
copy and look at no generation, tears: the suite would see it.
"""

import asyncio
import random
import threading
from collections import deque
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from kvstore.core.spec import CacheSpec
from kvstore.errors import UnavailableError
from kvstore_client import AsyncClient, Lease, Namespace
from kvstore_client.copying import Offsets
from kvstore_client.streaming import Bytes

from tests.faults.columns import SEED, size
from tests.faults.content import content
from tests.faults.ledger import Ledger
from tests.faults.live import HEAL_TIMEOUT_S, MIB, LiveNode, Observer
from tests.faults.report import Record, finish
from tests.node.rig import RawSession

READS = size(50_000, 1_000_000, 10_000_000)
OVERLAPPING = READS // 20
CONTROL_ROUNDS = 8
READERS = 4
BLOCK_BYTES = 8192
SPEC = CacheSpec.raw("slow", block_bytes=BLOCK_BYTES)
CHAIN_BLOCKS = 64
PART_BLOCKS = 8  # copied at a time
DRAM_BYTES = 4 * MIB
DRAM_CHAINS = DRAM_BYTES // (CHAIN_BLOCKS * BLOCK_BYTES)

_between: "threading.local" = threading.local()  # what a thread waits for in mid-copy


def slow_gather(pool: Bytes, offsets: Offsets, nbytes: int, out: Bytes) -> None:
    """Copies blocks in two halves, and waits between them."""
    rows = out.reshape(len(offsets), nbytes)
    half = nbytes // 2
    for row, offset in zip(rows, offsets.tolist(), strict=True):
        row[:half] = pool[offset : offset + half]
    _between.wait()
    for row, offset in zip(rows, offsets.tolist(), strict=True):
        row[half:] = pool[offset + half : offset + nbytes]


class Bench:
    """One node whose DRAM is written over and over, and the readers' findings."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.random = random.Random(SEED)
        self.ledger = Ledger(SEED)
        self.chains: deque[list[bytes]] = deque(maxlen=DRAM_CHAINS)  # written last
        self.puts = 0
        self.overlapped = self.discarded = self.torn = self.broken = 0
        self._wrote = threading.Condition()
        self._loop = asyncio.get_running_loop()

    async def connect(self) -> tuple[AsyncClient, Namespace]:
        """A session of its own."""
        client = await AsyncClient.connect(self.address, name="slow")
        return client, await client.open_namespace(SPEC)

    async def put(self, ns: Namespace) -> None:
        """Writes a chain over the least recently used slots."""
        keys = [self.random.randbytes(32) for _ in range(CHAIN_BLOCKS)]
        for key in keys:
            self.ledger.issue(key)
        data = [content(SEED, self.ledger.tenant, key, 0, BLOCK_BYTES) for key in keys]
        assert (await ns.put(keys, data)).stored == CHAIN_BLOCKS
        self.chains.append(keys)
        with self._wrote:
            self.puts += 1
            self._wrote.notify_all()

    def wait_for_puts(self, count: int) -> None:
        """In a copying thread: the writer goes on."""
        with self._wrote:
            goal = self.puts + count
            assert self._wrote.wait_for(lambda: self.puts >= goal, 30.0), "the writer stands still"

    async def copy(self, count: int, puts: int, part: Callable[[int, int, Bytes], None]) -> Bytes:
        """Copies blocks part by part in a thread, with so many puts in the midst of each part."""
        out = np.zeros((count, BLOCK_BYTES), np.uint8)

        def run() -> None:
            _between.wait = lambda: self.wait_for_puts(puts)
            for first in range(0, count, PART_BLOCKS):
                some = min(PART_BLOCKS, count - first)
                part(first, some, out[first : first + some])

        await asyncio.to_thread(run)
        return out

    async def read_under_lease(self, ns: Namespace) -> None:
        """A slow reader: all that it was granted is right."""
        keys = self.random.choice(self.chains)
        async with ns.read(keys) as read:
            lease = read.lease

            def part(first: int, count: int, out: Bytes) -> None:
                try:
                    lease.copy_into(out, first, count)
                except UnavailableError:
                    self.broken += count

            out = await self.copy(read.count, self.random.randrange(2), part)
            for key, block in zip(keys, out, strict=False):
                self.ledger.read(key, block.tobytes())

    async def read_late(self, client: AsyncClient, ns: Namespace) -> None:
        """A slow reader that loses its lease in mid-copy: right bytes, or it discards."""
        keys = self.chains[-1]
        lease = await ns.acquire(keys)
        count = await lease.wait()
        thief = await RawSession.open(
            self.address, namespace=False, client_id=client.client_id, settled=True
        )
        kept = np.zeros(count, np.bool_)

        def part(first: int, some: int, out: Bytes) -> None:
            try:
                lease.copy_into(out, first, some)
            except UnavailableError:
                self.discarded += some
            else:
                kept[first : first + some] = True
            self.overlapped += reused(lease, first, some)

        out = await self.copy(count, 2, part)
        for index in np.flatnonzero(kept).tolist():
            self.ledger.read(keys[index], out[index].tobytes())
        lease.release()
        await thief.goodbye()
        await client.reconnect()

    async def read_without_lease(self, ns: Namespace, client: AsyncClient) -> None:
        """The control: it lets go before it copies, and looks at no generation."""
        keys = self.chains[-1]
        lease = await ns.acquire(keys)
        count = await lease.wait()
        lease.release()
        pool, wrong_but_valid = client.mapping.pool, 0

        def part(first: int, some: int, out: Bytes) -> None:
            nonlocal wrong_but_valid
            slow_gather(pool, lease.offsets[first : first + some], BLOCK_BYTES, out)
            for index in range(some):
                wanted = content(SEED, self.ledger.tenant, keys[first + index], 0, BLOCK_BYTES)
                right = out[index].tobytes() == wanted
                self.torn += not right
                wrong_but_valid += not right and lease.still_valid(first + index, 1)

        await self.copy(count, 2, part)
        self.ledger.wrong += wrong_but_valid

    async def while_writing(self, work: Awaitable[None]) -> None:
        """Does ``work`` while a writer writes without a pause."""
        client, ns = await self.connect()
        while len(self.chains) < DRAM_CHAINS // 2:
            await self.put(ns)

        async def write() -> None:
            while True:
                await self.put(ns)

        writer = asyncio.create_task(write())
        working = asyncio.ensure_future(work)
        await asyncio.wait([writer, working], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            writer.result()
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
        working.result()
        await client.close()


def reused(lease: Lease, first: int, count: int) -> int:
    """How many of these blocks had their slot given to another."""
    return sum(not lease.still_valid(index, 1) for index in range(first, first + count))


async def control(bench: Bench) -> None:
    """Readers without leases."""
    client, ns = await bench.connect()
    for _ in range(CONTROL_ROUNDS):
        await bench.read_without_lease(ns, client)
    await client.close()


async def real(bench: Bench) -> None:
    """Slow readers under leases, and one that loses its own."""

    async def under_lease() -> None:
        client, ns = await bench.connect()
        while bench.ledger.reads < READS and not bench.ledger.wrong + bench.broken:
            await bench.read_under_lease(ns)
        await client.close()

    async def late() -> None:
        client, ns = await bench.connect()
        for _ in range(OVERLAPPING):  # far more rounds than are needed
            if bench.overlapped >= OVERLAPPING or bench.ledger.wrong:
                break
            await bench.read_late(client, ns)
        await client.close()

    await asyncio.gather(late(), *(under_lease() for _ in range(READERS)))


@pytest.mark.timeout(size(180, 1800, 14_400))
async def test_F13_slow_readers_against_reuse(
    record_property: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore_client.lease.gather", slow_gather)
    with LiveNode(dram=DRAM_BYTES, ssd=0) as node:
        bench = Bench(node.start())
        await bench.while_writing(control(bench))
        await bench.while_writing(real(bench))
        await Observer(node.address).idle(HEAL_TIMEOUT_S)
    finish(
        record_property,
        "F13 slow reader",
        reads=bench.ledger.reads + bench.discarded,
        overlapping=bench.overlapped,
        discarded=bench.discarded,
        torn_in_control=bench.torn,
        lost=0,
        wrong=bench.ledger.wrong + bench.broken,
    )
    assert bench.torn, "the control must tear: else nothing here would be seen"
    assert bench.overlapped >= OVERLAPPING


def test_slow_copies_are_whole() -> None:
    pool = np.arange(8 * 64, dtype=np.uint8)
    offsets = np.array([128, 0, 320])
    fast, slow = np.zeros(192, np.uint8), np.zeros(192, np.uint8)
    _between.wait = lambda: None
    slow_gather(pool, offsets, 64, slow)
    for index, offset in enumerate(offsets.tolist()):
        fast[64 * index : 64 * (index + 1)] = pool[offset : offset + 64]
    assert (fast == slow).all()
