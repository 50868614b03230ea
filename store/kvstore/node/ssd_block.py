"""Blocks of the SSD tier: the slot of one, the proof of its bytes, runs that go as one request."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

import xxhash

from kvstore.core.effects import ReadSsd, WriteSsd
from kvstore.core.spec import SLOT_ALIGN_BYTES
from kvstore.node.ssd_file import RUN_BUFFERS_MAX

OpT = TypeVar("OpT", ReadSsd, WriteSsd)


def slot_bytes(nbytes: int) -> int:
    """Bytes of the slot of a block of ``nbytes``."""
    return -(-nbytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES


def verify(block: memoryview, checksums: Sequence[int]) -> bool:
    """Whether every shard of a block has the checksum that it was committed with."""
    count = len(checksums)
    size = len(block)
    return all(
        xxhash.xxh3_64_intdigest(block[i * size // count : (i + 1) * size // count]) == checksum
        for i, checksum in enumerate(checksums)
    )


def slots_of(ops: Sequence[ReadSsd] | Sequence[WriteSsd], memory: memoryview) -> list[memoryview]:
    """The slots in DRAM that requests read into or write from."""
    return [memory[op.dram_offset : op.dram_offset + slot_bytes(op.nbytes)] for op in ops]


def runs_of(ops: Sequence[OpT], bytes_max: int) -> Iterator[list[OpT]]:
    """``ops`` split into runs of neighbours on the medium, each of at most ``bytes_max``."""
    run: list[OpT] = []
    end = nbytes = 0
    for op in ops:
        size = slot_bytes(op.nbytes)
        fits = nbytes + size <= bytes_max and len(run) < RUN_BUFFERS_MAX
        if run and (op.ssd_offset != end or not fits):
            yield run
            run, nbytes = [], 0
        run.append(op)
        nbytes += size
        end = op.ssd_offset + size
    if run:
        yield run
