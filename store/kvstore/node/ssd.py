"""The SSD tier's I/O: blocks between pool and data file on threads, in the order that is safe.

A write is data, fdatasync, index commit, then its report; many are grouped under one fdatasync and
one commit, and while a group is synced and committed the data of the next is written. What is
written is verified first: no bytes become durable that are not those of the commit. A removal is
committed before it is reported, and only then may its space be reused.
A read is verified, shard by shard, after its bytes are in the pool. Reports come on the event
loop, many in one call: the first reads of a stream at once, then some milliseconds' worth.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import lmdb
import xxhash

from kvstore.core.effects import DropSsd, ReadSsd, WriteSsd
from kvstore.core.spec import SLOT_ALIGN_BYTES
from kvstore.core.types import IoOutcome
from kvstore.faultpoint import faultpoint
from kvstore.node.ssd_file import RUN_BUFFERS_MAX, SsdFile
from kvstore.node.ssd_index import SsdIndex, is_full

log = logging.getLogger(__name__)

IO_THREADS = 4  # reads, and writes, that the device has at a time
READ_RUN_BYTES = 4 << 20  # short, so that the first blocks of a prompt are usable early
WRITE_RUN_BYTES = 4 << 20
GROUP_BYTES = 64 << 20
GROUP_CHANGES = 16384
REPORT_READS = 16  # that have ended are reported at once: as many as the core starts together
REPORT_PAUSE_S = 0.003  # else from one report of reads to the next
GROUPS_BEGUN_MAX = 2  # one is synced and committed, the data of the next is written
FULL_PAUSE_S = 0.1  # before an index without room is tried again


class SsdReports(Protocol):
    """Whoever hears, on the event loop, how requests ended."""

    def reads_done(self, done: Sequence[tuple[ReadSsd, IoOutcome]]) -> None:
        """Reads, in the order in which they ended."""

    def writes_done(self, done: Sequence[WriteSsd], ok: bool) -> None:
        """Writes of one group that ended alike."""

    def writes_corrupt(self, done: Sequence[WriteSsd]) -> None:
        """Blocks whose bytes were not those that were committed: none of them was kept."""

    def drops_done(self, done: Sequence[DropSsd]) -> None:
        """Removals that are durable."""


Change = WriteSsd | DropSsd
Written = Future[dict[int, IoOutcome]]  # of a run: what is not on the medium, by id
Group = tuple[list[Change], list[Written]]
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


class SsdTier:
    """Carries out the core's disk requests; its methods are called on the event loop only."""

    def __init__(
        self, file: SsdFile, index: SsdIndex, memory: memoryview, reports: SsdReports
    ) -> None:
        self.file = file
        self.index = index
        self.failed = ""  # why nothing is acknowledged any more; empty while all is well
        self.full = ""  # why the index takes nothing for now
        self._memory = memory
        self._reports = reports
        self._loop = asyncio.get_running_loop()
        # Twice as many: while some verify, others keep the device busy.
        self._threads = ThreadPoolExecutor(2 * IO_THREADS, "ssd-io")
        self._writers = ThreadPoolExecutor(2 * IO_THREADS, "ssd-write")
        self._may_read = threading.Semaphore(IO_THREADS)
        self._may_write = threading.Semaphore(IO_THREADS)
        self._changes: queue.SimpleQueue[Sequence[Change] | None] = queue.SimpleQueue()
        self._begun: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        self._may_begin = threading.Semaphore(GROUPS_BEGUN_MAX)
        self._starter = threading.Thread(target=self._start_loop, name="ssd-start")
        self._committer = threading.Thread(target=self._commit_loop, name="ssd-commit")
        self._starter.start()
        self._committer.start()
        self._outstanding = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._inbox: list[Callable[[], None]] = []
        self._read: list[tuple[ReadSsd, IoOutcome]] = []  # ended, not reported yet
        self._reads_out = 0  # not ended yet
        self._reads_due = 0.0  # a report of reads before this, in the loop's time, needs a reason
        self._reads_timer: asyncio.TimerHandle | None = None
        self._inbox_lock = threading.Lock()

    def submit_reads(self, reads: Sequence[ReadSsd]) -> None:
        """Starts reads; neighbours on the medium go as one request."""
        self._started(len(reads))
        with self._inbox_lock:
            self._reads_out += len(reads)
        for run in _runs(reads, READ_RUN_BYTES):
            self._threads.submit(self._read_run, run)

    def submit_changes(self, changes: Sequence[Change]) -> None:
        """Queues writes and removals; they become durable in this order, in groups."""
        self._started(len(changes))
        self._changes.put(changes)

    async def drain(self) -> None:
        """Returns when everything submitted has been reported."""
        await self._idle.wait()

    def close(self) -> None:
        """Ends the threads after what they have in hand; nothing more is reported.

        File and index stay open: they are their owner's.
        """
        if self._reads_timer is not None:
            self._reads_timer.cancel()
        self._changes.put(None)
        self._starter.join()
        self._committer.join()
        self._threads.shutdown(cancel_futures=True)
        self._writers.shutdown()

    def _started(self, count: int) -> None:
        self._outstanding += count
        if self._outstanding:
            self._idle.clear()

    def _finished(self, count: int) -> None:
        self._outstanding -= count
        if not self._outstanding:
            self._idle.set()

    # On threads

    def _post(self, report: Callable[[], None]) -> None:
        """Has ``report`` called on the event loop; many posts share one wake-up."""
        with self._inbox_lock:
            self._inbox.append(report)
            if len(self._inbox) > 1:
                return
        self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._inbox_lock:
            inbox, self._inbox = self._inbox, []
        for report in inbox:
            try:
                report()
            except Exception:  # a bug must not keep the other reports from being heard
                log.exception("report of a disk request failed")

    def _slots(self, ops: Sequence[ReadSsd] | Sequence[WriteSsd]) -> list[memoryview]:
        return [self._memory[op.dram_offset : op.dram_offset + slot_bytes(op.nbytes)] for op in ops]

    def _read_run(self, run: Sequence[ReadSsd]) -> None:
        try:
            faultpoint("ssd.read")
            slots = self._slots(run)
            with self._may_read:
                self.file.read(slots, run[0].ssd_offset)
            done = [(op, self._verified(op)) for op in run]
        except OSError as error:
            log.error("SSD read at byte %d failed: %s", run[0].ssd_offset, error)
            done = [(op, IoOutcome.FAILED) for op in run]
        with self._inbox_lock:
            self._read += done
            self._reads_out -= len(done)
            if len(self._read) > len(done) and not self._pressing():
                return
        self._post(self._reads_ended)

    def _verified(self, op: ReadSsd) -> IoOutcome:
        block = self._memory[op.dram_offset : op.dram_offset + op.nbytes]
        if verify(block, op.checksums):
            return IoOutcome.OK
        log.error("SSD block %s at byte %d is corrupt", op.key.hex()[:16], op.ssd_offset)
        return IoOutcome.CORRUPT

    def _reads_ended(self) -> None:
        with self._inbox_lock:
            pressing = self._pressing()
        if pressing or self._loop.time() >= self._reads_due:
            self._report_reads()
        elif self._reads_timer is None:
            self._reads_timer = self._loop.call_at(self._reads_due, self._report_reads)

    def _pressing(self) -> bool:
        """Whether reads are to be reported without a pause; with the lock held."""
        return len(self._read) >= REPORT_READS or not self._reads_out

    def _report_reads(self) -> None:
        """All that have ended by now, in one call: it costs the event loop hardly more than one."""
        if self._reads_timer is not None:
            self._reads_timer.cancel()
            self._reads_timer = None
        with self._inbox_lock:
            done, self._read = self._read, []
        if not done:
            return  # reported already
        self._reads_due = self._loop.time() + REPORT_PAUSE_S
        self._finished(len(done))
        self._reports.reads_done(done)

    def _start_loop(self) -> None:
        for group in self._groups():
            writes = [op for op in group if isinstance(op, WriteSsd) and not self.failed]
            runs = _runs(writes, WRITE_RUN_BYTES)
            self._begun.put((group, [self._writers.submit(self._write_run, run) for run in runs]))
        self._begun.put(None)

    def _commit_loop(self) -> None:
        while (begun := self._begun.get()) is not None:
            group, jobs = begun
            try:
                self._commit(group, jobs)
            except Exception:  # a bug; without this thread every writer would wait for ever
                log.exception("a group of changes failed")
                self._fail("a bug; the log has it")
                self._report_lost(group)
            self._may_begin.release()

    def _groups(self) -> Iterator[list[Change]]:
        """Everything queued up to the bounds of a group, then the next; ends at close."""
        while (changes := self._changes.get()) is not None:
            self._may_begin.acquire()
            group = list(changes)
            nbytes = sum(op.nbytes for op in changes if isinstance(op, WriteSsd))
            while nbytes < GROUP_BYTES and len(group) < GROUP_CHANGES and not self._changes.empty():
                if (more := self._changes.get()) is None:
                    yield group
                    return
                group += more
                nbytes += sum(op.nbytes for op in more if isinstance(op, WriteSsd))
            yield group

    def _commit(self, group: Sequence[Change], jobs: Sequence[Written]) -> None:
        writes = [op for op in group if isinstance(op, WriteSsd)]
        drops = [op for op in group if isinstance(op, DropSsd)]
        bad = self._write_data(writes, jobs)
        changes: list[tuple[bytes, bytes | None]] = [
            (op.key, op.record.encode() if isinstance(op, WriteSsd) else None)
            for op in group
            if isinstance(op, DropSsd) or id(op) not in bad
        ]
        try:
            faultpoint("ssd.index")
            self.index.apply(changes)
            faultpoint("ssd.indexed")
        except (lmdb.Error, OSError) as error:
            if is_full(error, self.index.path):
                self._put_off(writes, drops, error)
            else:
                self._fail(f"index commit: {error}")
                self._report_lost(group)
            return
        if self.full and changes:
            log.info("SSD index has room again")
            self.full = ""
        kept = [op for op in writes if id(op) not in bad]
        failed = [op for op in writes if bad.get(id(op)) is IoOutcome.FAILED]
        corrupt = [op for op in writes if bad.get(id(op)) is IoOutcome.CORRUPT]
        self._post(lambda: self._report_group(failed, kept, drops, corrupt))

    def _put_off(
        self, writes: Sequence[WriteSsd], drops: Sequence[DropSsd], error: Exception
    ) -> None:
        """No room for the index: nothing has changed. Removals wait until there is room again."""
        if not self.full:
            log.error("SSD index has no room: %s; no new block stays on SSD until it has", error)
            self.full = str(error)
        time.sleep(FULL_PAUSE_S)
        # A record that the restore refused is refused again: its key may be stored anew by then.
        again = [op for op in drops if op.row >= 0]
        if again:
            self._changes.put(again)
        refused = [op for op in drops if op.row < 0]
        self._post(lambda: self._report_group(writes, (), refused))

    def _report_lost(self, group: Sequence[Change]) -> None:
        writes = [op for op in group if isinstance(op, WriteSsd)]
        stuck = len(group) - len(writes)
        self._post(lambda: self._report_group(writes, (), (), stuck=stuck))

    def _write_data(
        self, writes: Sequence[WriteSsd], jobs: Sequence[Written]
    ) -> dict[int, IoOutcome]:
        """Ends the writing, and syncs; by id, why a request's data is not on the medium."""
        wait(jobs)
        if self.failed or not writes:
            return {id(op): IoOutcome.FAILED for op in writes}
        bad = {place: outcome for job in jobs for place, outcome in job.result().items()}
        try:
            faultpoint("ssd.sync")
            self.file.sync()
        except OSError as error:
            # After a failed fdatasync the kernel has forgotten which pages were dirty: what this
            # file holds is unknown until it is written again.
            self._fail(f"fdatasync: {error}")
            return {id(op): IoOutcome.FAILED for op in writes}
        return bad

    def _write_run(self, run: Sequence[WriteSsd]) -> dict[int, IoOutcome]:
        bad = {id(op): IoOutcome.CORRUPT for op in run if not self._proven(op)}
        try:
            faultpoint("ssd.data")
            slots = self._slots(run)
            with self._may_write:
                self.file.write(slots, run[0].ssd_offset)
        except OSError as error:
            log.error("SSD write at byte %d failed: %s", run[0].ssd_offset, error)
            return {id(op): IoOutcome.FAILED for op in run}
        return bad

    def _proven(self, op: WriteSsd) -> bool:
        """Whether the bytes in DRAM are those of the commit, before they are made durable."""
        block = self._memory[op.dram_offset : op.dram_offset + op.nbytes]
        if verify(block, op.record.checksums):
            return True
        log.error("block %s in DRAM is not what was committed: dropped", op.key.hex()[:16])
        return False

    def _fail(self, reason: str) -> None:
        if not self.failed:
            log.error(
                "SSD tier takes no more writes until the node is restarted: %s; reads and DRAM go "
                "on, new blocks are in memory only",
                reason,
            )
            self.failed = reason

    def _report_group(
        self,
        failed: Sequence[WriteSsd],
        kept: Sequence[WriteSsd],
        drops: Sequence[DropSsd],
        corrupt: Sequence[WriteSsd] = (),
        stuck: int = 0,
    ) -> None:
        # The space of a stuck removal is never reported free: its old record may still stand.
        self._finished(len(failed) + len(kept) + len(drops) + len(corrupt) + stuck)
        if failed:
            self._reports.writes_done(failed, ok=False)
        if kept:
            self._reports.writes_done(kept, ok=True)
        if corrupt:
            self._reports.writes_corrupt(corrupt)
        if drops:
            self._reports.drops_done(drops)


def _runs(ops: Sequence[OpT], bytes_max: int) -> Iterator[list[OpT]]:
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
