"""A virtual SSD: bytes, a cache that a loss of power forgets, an index, requests of any order."""

from collections.abc import Sequence
from typing import Protocol

from kvstore.core.effects import DropSsd, ReadSsd, WriteSsd
from kvstore.core.types import IoOutcome
from kvstore.node import ssd_block

from tests.sim.world import World

PAGE_BYTES = 4096


class Medium:
    """What stays when the node's process ends."""

    def __init__(self, nbytes: int) -> None:
        self.data = bytearray(nbytes)  # on the medium
        self.cache: dict[int, bytes] = {}  # by page: written, not synced
        self.index: dict[bytes, bytes] = {}  # key to encoded record, on the medium
        self.damaged: set[int] = set()  # pages hit by a fault since they were written

    def write(self, offset: int, data: bytes) -> None:
        """Into the cache."""
        padded = data + bytes(-len(data) % PAGE_BYTES)
        for at in range(0, len(padded), PAGE_BYTES):
            self.cache[offset + at] = padded[at : at + PAGE_BYTES]
            self.damaged.discard(offset + at)

    def sync(self) -> None:
        """All that is in the cache is on the medium."""
        for offset, page in self.cache.items():
            self.data[offset : offset + PAGE_BYTES] = page
        self.cache.clear()

    def read(self, offset: int, nbytes: int, *, durable: bool = False) -> bytes:
        """What a read gives, or (``durable``) what a loss of power would leave."""
        data = bytearray(self.data[offset : offset + nbytes])
        if not durable and self.cache:
            for at in range(0, nbytes, PAGE_BYTES):
                if (page := self.cache.get(offset + at)) is not None:
                    data[at : at + PAGE_BYTES] = page[: nbytes - at]
        return bytes(data)

    def is_damaged(self, offset: int, nbytes: int) -> bool:
        """Whether a fault hit these bytes."""
        return any(page in self.damaged for page in range(offset, offset + nbytes, PAGE_BYTES))

    def lose_power(self, world: World) -> None:
        """Of what was not synced, any part may have reached the medium, in any state."""
        for offset, page in self.cache.items():
            kept = world.random.choice((0, 0, PAGE_BYTES, world.random.randrange(PAGE_BYTES)))
            self.data[offset : offset + kept] = page[:kept]
        self.cache.clear()

    def flip(self, world: World) -> None:
        """A bit turns somewhere."""
        if self.data:
            at = world.random.randrange(len(self.data) // PAGE_BYTES) * PAGE_BYTES
            self.damaged.add(at)
            self.cache.pop(at, None)
            self.data[at + world.random.randrange(256)] ^= 1 << world.random.randrange(8)

    def cut_off(self, world: World) -> None:
        """The end of the file is gone, and comes back empty."""
        if self.data:
            pages = len(self.data) // PAGE_BYTES
            first = world.random.randrange(pages // 2, pages) * PAGE_BYTES
            self.data[first:] = bytes(len(self.data) - first)
            for at in range(first, len(self.data), PAGE_BYTES):
                self.damaged.add(at)
                self.cache.pop(at, None)


class Reports(Protocol):
    """Who hears how requests ended."""

    def reads_done(self, done: Sequence[tuple[ReadSsd, IoOutcome]]) -> None:
        """Reads ended."""

    def writes_done(self, done: Sequence[WriteSsd], ok: bool) -> None:
        """Writes of one group ended alike."""

    def drops_done(self, done: Sequence[DropSsd]) -> None:
        """Removals are durable."""


class Device:
    """The disk requests of one life of a node, as its SSD tier carries them out.

    Reads end in any order. Writes go in groups, one after the other: data, sync, index, report,
    each at a moment of its own, with a crash possible between any two. Removals go with any group
    whose index is not written yet, or by themselves.
    """

    def __init__(self, world: World, name: str, medium: Medium, pool: bytearray) -> None:
        self.failing = 0.0  # how often a request of the file system is refused
        self.dead = False
        self.reports: Reports
        self._world = world
        self._name = name
        self._medium = medium
        self._pool = pool
        self._sync_failed = False
        self._queue: list[WriteSsd] = []
        self._drops: list[DropSsd] = []
        self._busy = False

    def _later(self, what: str, call: object, *arguments: object) -> None:
        def happen() -> bool:
            if self.dead:
                return False
            call(*arguments)  # type: ignore[operator]
            return True

        self._world.after(self._world.soon(0.02), f"{self._name} {what}", happen)

    def submit_reads(self, reads: Sequence[ReadSsd]) -> None:
        """Starts them; until they end, nobody may count on the bytes in their slots."""
        for op in reads:
            self._pool[op.dram_offset : op.dram_offset + op.nbytes] = b"\xdb" * op.nbytes
        size = self._world.random.choice((1, 1, 2, 4))
        for first in range(0, len(reads), size):
            self._later("read", self._read, reads[first : first + size])

    def _read(self, ops: Sequence[ReadSsd]) -> None:
        done = []
        refused = self._world.chance(self.failing)
        for op in ops:
            if refused:
                done.append((op, IoOutcome.FAILED))
                continue
            data = self._medium.read(op.ssd_offset, op.nbytes)
            self._pool[op.dram_offset : op.dram_offset + op.nbytes] = data
            good = ssd_block.verify(memoryview(data), op.checksums)
            done.append((op, IoOutcome.OK if good else IoOutcome.CORRUPT))
        self.reports.reads_done(done)

    def submit_writes(self, writes: Sequence[WriteSsd]) -> None:
        """Queues them in their order."""
        self._queue += writes
        if not self._busy:
            self._busy = True
            self._later("group", self._begin_group)

    def submit_drops(self, drops: Sequence[DropSsd]) -> None:
        """They go when nothing else does, or with a group."""
        self._drops += drops
        self._later("removal", self._remove)

    def _remove(self) -> None:
        if drops := self._take_drops():
            self._later("report", self.reports.drops_done, drops)

    def _take_drops(self) -> list[DropSsd]:
        """Those that are due, gone from the index."""
        drops, self._drops = self._drops, []
        for op in drops:
            self._medium.index.pop(op.key, None)
        return drops

    def _begin_group(self) -> None:
        count = self._world.random.randint(1, len(self._queue))
        group, self._queue = self._queue[:count], self._queue[count:]
        lost: set[int] = set()
        for op in group:
            if self._sync_failed or self._world.chance(self.failing):
                lost.add(id(op))
            else:
                block = self._pool[op.dram_offset : op.dram_offset + op.nbytes]
                self._medium.write(op.ssd_offset, bytes(block))
        self._later("sync", self._sync, group, lost)

    def _sync(self, group: list[WriteSsd], lost: set[int]) -> None:
        if self._world.chance(self.failing / 4):
            # After a failed fdatasync nothing that this file holds is known.
            self._sync_failed = True
        if self._sync_failed:
            lost |= {id(op) for op in group}
        else:
            self._medium.sync()
        self._later("index", self._index, group, lost)

    def _index(self, group: list[WriteSsd], lost: set[int]) -> None:
        drops = self._take_drops() if self._world.chance(0.5) else []
        for op in group:
            if id(op) not in lost:
                self._medium.index[op.key] = op.record.encode()
        self._later("report", self._report, group, lost, drops)
        if self._queue:
            self._later("group", self._begin_group)
        else:
            self._busy = False

    def _report(self, group: list[WriteSsd], lost: set[int], drops: list[DropSsd]) -> None:
        failed = [op for op in group if id(op) in lost]
        kept = [op for op in group if id(op) not in lost]
        if failed:
            self.reports.writes_done(failed, False)
        if kept:
            self.reports.writes_done(kept, True)
        if drops:
            self.reports.drops_done(drops)
