"""The SSD tier's I/O: blocks between pool and data file on threads.

A read is verified, shard by shard, after its bytes are in the pool. Reports come on the event
loop, many in one call: the first reads of a stream at once, then some milliseconds' worth.
Writes and removals: ``ssd_writer``.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from kvstore.core.effects import DropSsd, ReadSsd, WriteSsd
from kvstore.core.types import IoOutcome
from kvstore.faultpoint import faultpoint
from kvstore.node import ssd_block
from kvstore.node.ssd_file import SsdFile
from kvstore.node.ssd_index import SsdIndex
from kvstore.node.ssd_writer import ChangeReports, SsdWriter

log = logging.getLogger(__name__)

IO_THREADS = 4  # reads that the device has at a time
READ_RUN_BYTES = 4 << 20  # short, so that the first blocks of a prompt are usable early
REPORT_READS = 16  # that have ended are reported at once: as many as the core starts together
REPORT_PAUSE_S = 0.003  # else from one report of reads to the next


class SsdReports(ChangeReports, Protocol):
    """Whoever hears, on the event loop, how requests ended."""

    def reads_done(self, done: Sequence[tuple[ReadSsd, IoOutcome]]) -> None:
        """Reads, in the order in which they ended."""


class SsdTier:
    """Carries out the core's disk requests; its methods are called on the event loop only."""

    def __init__(
        self,
        file: SsdFile,
        index: SsdIndex,
        memory: memoryview,
        reports: SsdReports,
        *,
        prove_all: bool = False,
    ) -> None:
        """``prove_all``: blocks are all verified before a write, also while writes queue up."""
        self.file = file
        self.index = index
        self._memory = memory
        self._reports = reports
        self._loop = asyncio.get_running_loop()
        # Twice as many: while some verify, others keep the device busy.
        self._threads = ThreadPoolExecutor(2 * IO_THREADS, "ssd-io")
        self._may_read = threading.Semaphore(IO_THREADS)
        self._outstanding = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._inbox: list[Callable[[], None]] = []
        self._read: list[tuple[ReadSsd, IoOutcome]] = []  # ended, not reported yet
        self._reads_out = 0  # not ended yet
        self._reads_due = 0.0  # a report of reads before this, in the loop's time, needs a reason
        self._reads_timer: asyncio.TimerHandle | None = None
        self._inbox_lock = threading.Lock()
        self._writer = SsdWriter(
            file,
            index,
            memory,
            reports,
            prove_all=prove_all,
            post=self._post,
            ended=self._finished,
        )

    @property
    def failed(self) -> str:
        """Why no write is acknowledged any more; empty while all is well."""
        return self._writer.failed

    @property
    def full(self) -> str:
        """Why the index takes nothing for now; empty while it does."""
        return self._writer.full

    @property
    def verifies_all(self) -> bool:
        """Whether every block is verified before it is written, also while writes queue up."""
        return self._writer.proves_all

    def suspect(self) -> None:
        """A block was corrupt: from now on all are verified before they are written."""
        self._writer.suspect()

    def look(self) -> None:
        """Fails where its files were taken from under it; called on any thread."""
        self._writer.look()

    def submit_reads(self, reads: Sequence[ReadSsd]) -> None:
        """Starts reads; neighbours on the medium go as one request."""
        self._started(len(reads))
        with self._inbox_lock:
            self._reads_out += len(reads)
        for run in ssd_block.runs_of(reads, READ_RUN_BYTES):
            self._threads.submit(self._read_run, run)

    def submit_writes(self, writes: Sequence[WriteSsd]) -> None:
        """Queues writes; they become durable in this order, in groups."""
        self._started(len(writes))
        self._writer.submit_writes(writes)

    def submit_drops(self, drops: Sequence[DropSsd]) -> None:
        """Queues removals.

        No write of their keys may be out; one that is submitted later ends later.
        """
        self._started(len(drops))
        self._writer.submit_drops(drops)

    async def drain(self) -> None:
        """Returns when everything submitted has been reported."""
        await self._idle.wait()

    def close(self) -> None:
        """Ends the threads after what they have in hand; nothing more is reported.

        File and index stay open: they are their owner's.
        """
        if self._reads_timer is not None:
            self._reads_timer.cancel()
        self._writer.close()
        self._threads.shutdown(cancel_futures=True)

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

    def _read_run(self, run: Sequence[ReadSsd]) -> None:
        try:
            faultpoint("ssd.read")
            slots = ssd_block.slots_of(run, self._memory)
            with self._may_read:
                self.file.read(slots, run[0].ssd_offset)
            done = [(op, self._verified(op)) for op in run]
        except OSError as error:
            if len(run) > 1:  # the others of the run may be sound
                for op in run:
                    self._read_run([op])
                return
            log.error("SSD read at byte %d failed: %s", run[0].ssd_offset, error)
            done = [(run[0], IoOutcome.FAILED)]
        except Exception:  # a bug; who waits for the blocks would wait for ever
            log.exception("a run of reads failed")
            done = [(op, IoOutcome.FAILED) for op in run]
        with self._inbox_lock:
            self._read += done
            self._reads_out -= len(done)
            if len(self._read) > len(done) and not self._pressing():
                return
        self._post(self._reads_ended)

    def _verified(self, op: ReadSsd) -> IoOutcome:
        block = self._memory[op.dram_offset : op.dram_offset + op.nbytes]
        if ssd_block.verify(block, op.checksums):
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
        try:
            self._reports.reads_done(done)
        finally:  # what follows from the report is outstanding by now
            self._finished(len(done))
