"""Reads blocks from the data file to prove them, beside the SSD tier's own I/O."""

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from kvstore.core.types import IoOutcome
from kvstore.faultpoint import faultpoint
from kvstore.node.ssd_block import slot_bytes, verify


class Placed(Protocol):
    """A block with its place in the data file and its proof."""

    @property
    def ssd_offset(self) -> int:
        """Where its slot begins."""

    @property
    def nbytes(self) -> int:
        """Its length."""

    @property
    def checksums(self) -> tuple[int, ...]:
        """Of its shards."""


PlacedT = TypeVar("PlacedT", bound=Placed)


class BlockReader:
    """A descriptor and a buffer of its own: it takes no slot, thread or lock from anybody else.

    ``outcomes`` is called by one thread at a time.
    """

    def __init__(self, path: Path) -> None:
        """OSError if the file cannot be opened."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        self._direct = True
        try:
            self._descriptor = os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._direct = False
            self._descriptor = os.open(path, flags)
        self._buffer = mmap.mmap(-1, mmap.PAGESIZE)

    def outcomes(self, run: Sequence[Placed]) -> list[IoOutcome]:
        """How the read of each block ended; neighbours in the file, read as one request."""
        try:
            self._read(run[0].ssd_offset, sum(slot_bytes(block.nbytes) for block in run))
        except OSError:
            if len(run) == 1:
                return [IoOutcome.FAILED]
            return [outcome for block in run for outcome in self.outcomes([block])]
        found = []
        start = 0
        with memoryview(self._buffer) as view:
            for block in run:
                with view[start : start + block.nbytes] as data:
                    good = verify(data, block.checksums)
                found.append(IoOutcome.OK if good else IoOutcome.CORRUPT)
                start += slot_bytes(block.nbytes)
        return found

    def _read(self, offset: int, nbytes: int) -> None:
        if len(self._buffer) < nbytes:
            buffer, self._buffer = self._buffer, mmap.mmap(-1, nbytes)
            buffer.close()
        faultpoint("ssd.check")
        if not self._direct:  # the medium is to be proven, not the page cache
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
        done = 0
        with memoryview(self._buffer) as view:
            while done < nbytes:
                with view[done:nbytes] as rest:
                    step = os.preadv(self._descriptor, [rest], offset + done)
                if step == 0:
                    raise OSError(errno.EIO, "the data file ends before the block does")
                done += step

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)
        self._buffer.close()


def runs_of(blocks: Sequence[PlacedT], bytes_max: int) -> Iterator[list[PlacedT]]:
    """Blocks in the order of the file, as runs of neighbours of at most ``bytes_max``, or one."""
    run: list[PlacedT] = []
    for block in blocks:
        if run:
            start, end = run[0].ssd_offset, run[-1].ssd_offset + slot_bytes(run[-1].nbytes)
            if block.ssd_offset != end or end + slot_bytes(block.nbytes) - start > bytes_max:
                yield run
                run = []
        run.append(block)
    if run:
        yield run
