"""An SSD tier without a node around it."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import xxhash
from kvstore.core.effects import DropSsd, ReadSsd, WriteSsd
from kvstore.core.ssd_record import NO_PARENT, SsdRecord
from kvstore.core.types import IoOutcome
from kvstore.faultpoint import enable_faultpoints
from kvstore.node.pool import SharedFile
from kvstore.node.ssd import SsdTier
from kvstore.node.ssd_file import SsdFile
from kvstore.node.ssd_index import SsdIndex

PAGE = 4096
CAPACITY = 4 << 20
POOL = 2 << 20
ROOT = b"r" * 32


class Reports:
    """Remembers how requests ended."""

    def __init__(self) -> None:
        self.reads: dict[int, IoOutcome] = {}
        self.read = asyncio.Event()
        self.kept: list[WriteSsd] = []
        self.failed: list[WriteSsd] = []
        self.corrupt: list[WriteSsd] = []
        self.dropped: list[DropSsd] = []
        self.stuck: list[DropSsd] = []

    def reads_done(self, done: Sequence[tuple[ReadSsd, IoOutcome]]) -> None:
        self.reads |= {op.row: outcome for op, outcome in done}
        self.read.set()

    def writes_done(self, done: Sequence[WriteSsd], ok: bool) -> None:
        (self.kept if ok else self.failed).extend(done)

    def writes_corrupt(self, done: Sequence[WriteSsd]) -> None:
        self.corrupt.extend(done)

    def drops_done(self, done: Sequence[DropSsd], *, ok: bool) -> None:
        (self.dropped if ok else self.stuck).extend(done)


class Rig:
    """An SSD tier over a pool in a directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = SharedFile(folder / f"pool-{os.urandom(4).hex()}", POOL)
        self.memory = self.pool.map.memory
        self.reports = Reports()
        self.index = SsdIndex(folder, CAPACITY // PAGE, "node-1")
        self.file = SsdFile(folder, CAPACITY)
        self.file.probe(self.memory)
        self.tier = SsdTier(self.file, self.index, self.memory, self.reports)

    def close(self) -> None:
        self.tier.close()
        self.file.close()
        self.index.close()
        self.memory.release()
        self.pool.close()

    def write(self, row: int, data: bytes, ssd_offset: int, *, shards: int = 1) -> WriteSsd:
        """Puts ``data`` into the pool and returns the request to write it."""
        dram_offset = row * (128 << 10)
        self.memory[dram_offset : dram_offset + len(data)] = data
        size = len(data) // shards
        sums = tuple(
            xxhash.xxh3_64_intdigest(data[i * size : (i + 1) * size]) for i in range(shards)
        )
        key = row.to_bytes(32, "little")
        record = SsdRecord(key, ROOT, NO_PARENT, len(data), ssd_offset, sums, row)
        return WriteSsd(row, dram_offset, len(data), record)

    def read(self, op: WriteSsd, to: int | None = None) -> ReadSsd:
        offset = op.dram_offset if to is None else to
        return ReadSsd(op.row, op.key, op.ssd_offset, offset, op.nbytes, op.record.checksums)

    async def drain(self) -> None:
        async with asyncio.timeout(20):
            await self.tier.drain()

    def clear(self) -> None:
        self.memory[:] = bytes(POOL)


def arm(value: str) -> None:
    enable_faultpoints({"KVSTORE_FAULTPOINTS": value})
