"""The disk without a store: loops over a file with O_DIRECT, a few requests in flight."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Lock

from kvstore.shared_memory import HUGE_PAGE_BYTES, MADV_COLLAPSE, address_of, advise

from benchmarks.io_uring import Ring

PAGE_BYTES = 4096
HUGE_PAGE_TRIES = 3


@dataclass(frozen=True, slots=True)
class Requests:
    """``nbytes`` of the file from ``offset`` on, in pieces of ``block_bytes``.

    ``sync_bytes``: an fdatasync follows every so many bytes of a write; the write has ended when
    the last one has.
    """

    offset: int
    nbytes: int
    block_bytes: int
    in_flight: int
    sync_bytes: int = 0

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(offset in the file, offset in the memory) of each."""
        for at in range(0, self.nbytes, self.block_bytes):
            yield self.offset + at, at

    def groups(self) -> Iterator[list[tuple[int, int]]]:
        """Pieces between two fdatasyncs."""
        pieces, size = self.pieces(), max(1, self.sync_bytes // self.block_bytes)
        while group := list(islice(pieces, size)):
            yield group


class RawDisk:
    """A file opened with O_DIRECT, and memory in huge pages that is mapped from the start."""

    def __init__(self, path: Path, memory_bytes: int) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        # Private: the kernel gives shared memory no huge pages for this.
        self._map = mmap.mmap(-1, memory_bytes, flags=mmap.MAP_PRIVATE)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self.memory = memoryview(self._map)
        for at in range(0, memory_bytes, PAGE_BYTES):
            self.memory[at] = 1
        self.in_huge_pages = self._ask_for_huge_pages()

    def _ask_for_huge_pages(self) -> float:
        """As the node does for its pool, or the loop would be slow in fragmented memory.

        Returns the share of the memory that is in them.
        """
        base = address_of(self._map)
        first = base + -base % HUGE_PAGE_BYTES
        pages = range(first, base + len(self._map) - HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES)
        small = list(pages)
        for _ in range(HUGE_PAGE_TRIES):
            small = [page for page in small if advise(page, HUGE_PAGE_BYTES, MADV_COLLAPSE)]
        return 1 - len(small) / max(1, len(pages))

    def close(self) -> None:
        """Closes the file and gives the memory back."""
        self.memory.release()
        self._map.close()
        os.close(self._descriptor)

    def read(self, requests: Requests) -> float:
        """Seconds of reading with one thread a request in flight."""
        with ThreadPoolExecutor(requests.in_flight) as threads:
            start = time.perf_counter()
            self._by_threads(threads, os.preadv, list(requests.pieces()), requests)
            return time.perf_counter() - start

    def write(self, requests: Requests) -> float:
        """Seconds of writing with one thread a request in flight, and of every fdatasync."""
        with ThreadPoolExecutor(requests.in_flight) as threads:
            start = time.perf_counter()
            for group in requests.groups():
                self._by_threads(threads, os.pwritev, group, requests)
                os.fdatasync(self._descriptor)
            return time.perf_counter() - start

    def read_ring(self, requests: Requests) -> float:
        """Seconds of reading through io_uring from one thread."""
        with Ring(requests.in_flight) as ring:
            start = time.perf_counter()
            self._through(ring, list(requests.pieces()), requests, write=False)
            return time.perf_counter() - start

    def write_ring(self, requests: Requests) -> float:
        """Seconds of writing through io_uring from one thread, and of every fdatasync."""
        with Ring(requests.in_flight) as ring:
            start = time.perf_counter()
            for group in requests.groups():
                self._through(ring, group, requests, write=True)
                os.fdatasync(self._descriptor)
            return time.perf_counter() - start

    def _through(
        self, ring: Ring, pieces: list[tuple[int, int]], requests: Requests, *, write: bool
    ) -> None:
        def wanted(at: int) -> int:
            return min(requests.block_bytes, requests.nbytes - at)

        queued = iter(pieces)
        out = 0
        while True:
            for offset, at in islice(queued, requests.in_flight - out):
                piece = self.memory[at : at + wanted(at)]
                ring.prepare(self._descriptor, piece, offset, at, write=write)
                out += 1
            if not out:
                return
            for at, done in ring.submit_and_wait(1):
                out -= 1
                _check(done, wanted(at))

    def _by_threads(
        self,
        threads: ThreadPoolExecutor,
        call: Callable[[int, list[memoryview], int], int],
        pieces: list[tuple[int, int]],
        requests: Requests,
    ) -> None:
        queued, lock = iter(pieces), Lock()

        def work(_: int) -> None:
            while True:
                with lock:
                    offset, at = next(queued, (-1, -1))
                if offset < 0:
                    return
                size = min(requests.block_bytes, requests.nbytes - at)
                _check(call(self._descriptor, [self.memory[at : at + size]], offset), size)

        list(threads.map(work, range(requests.in_flight)))


def _check(done: int, wanted: int) -> None:
    if done != wanted:
        raise OSError(-done if done < 0 else 0, f"{done} of {wanted} bytes were moved")
