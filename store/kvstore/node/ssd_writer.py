"""The SSD tier's writes and removals: many in a group, durable in the order that is safe.

A write is data, fdatasync, index commit, then its report; many are grouped under one fdatasync and
one commit, and while a group is synced and committed the data of the next ones is written.

What is written is verified first, against the checksums of the commit; a block that fails never
becomes durable. While writes queue up only a sample is verified (decision 0008), until a block of
this node was found corrupt: from then on everything is.

A removal is committed before it is reported, and only then may its space be reused. It goes with
the next group that is committed, or at once where nothing is being written: a commit of its own
costs as much as a group's, 5 to 15 ms behind a busy device's queue.
"""

import logging
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import lmdb

from kvstore.core.effects import DropSsd, WriteSsd
from kvstore.core.types import IoOutcome
from kvstore.faultpoint import faultpoint
from kvstore.node import ssd_block
from kvstore.node.ssd_file import SsdFile
from kvstore.node.ssd_index import SsdIndex, is_full

log = logging.getLogger(__name__)

IO_THREADS = 4  # writes that the device has at a time
PROVERS = 2  # threads that prove what is to be written, ahead of those
GROUPS_BEHIND = 1  # whose data is not written yet: then a sample of the next one is proven
SAMPLE = 16  # blocks, of which one is proven
RUN_BYTES = 4 << 20
GROUP_BYTES = 64 << 20
GROUP_WRITES = 16384
GROUPS_BEGUN_MAX = 5  # one is synced and committed, the data of the next ones is written
FULL_PAUSE_S = 0.1  # before an index without room is tried again


class ChangeReports(Protocol):
    """Whoever hears, on the event loop, how writes and removals ended."""

    def writes_done(self, done: Sequence[WriteSsd], ok: bool) -> None:
        """Writes of one group that ended alike."""

    def writes_corrupt(self, done: Sequence[WriteSsd]) -> None:
        """Blocks whose bytes were not those that were committed: none of them was kept."""

    def drops_done(self, done: Sequence[DropSsd], *, ok: bool) -> None:
        """Removals that are durable; or, not ``ok``, never will be."""


@dataclass(slots=True, eq=False)
class _Group:
    """Writes that become durable together."""

    writes: list[WriteSsd]
    running: int  # runs of them whose data is being written
    sampled: bool  # not all of them need to be proven
    bad: dict[int, IoOutcome] = field(default_factory=dict)  # why one is not on the medium, by id


class _Run(NamedTuple):
    """Neighbours on the medium, written as one request."""

    writes: Sequence[WriteSsd]
    group: _Group
    bad: dict[int, IoOutcome]  # as the group's


class SsdWriter:
    """Carries out changes of the SSD tier; ``submit_*`` may be called from one thread only.

    ``post`` has a call made on the event loop. ``ended`` hears there how many requests have ended,
    after their reports.
    """

    def __init__(
        self,
        file: SsdFile,
        index: SsdIndex,
        memory: memoryview,
        reports: ChangeReports,
        *,
        prove_all: bool,
        post: Callable[[Callable[[], None]], None],
        ended: Callable[[int], None],
    ) -> None:
        self.file = file
        self.index = index
        self.failed = ""  # why nothing is acknowledged any more; empty while all is well
        self.full = ""  # why the index takes nothing for now
        self.proves_all = prove_all  # also while writes queue up
        self._memory = memory
        self._reports = reports
        self._post = post
        self._ended = ended
        # A writer finds its next run proven: between two writes it waits for the interpreter once.
        self._begun_runs: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._proven_runs: queue.SimpleQueue[_Run | None] = queue.SimpleQueue()
        self._provers = [
            threading.Thread(target=self._prove_loop, name=f"ssd-prove-{i}") for i in range(PROVERS)
        ]
        self._writers = [
            threading.Thread(target=self._write_loop, name=f"ssd-write-{i}")
            for i in range(IO_THREADS)
        ]
        self._writes: queue.SimpleQueue[Sequence[WriteSsd] | None] = queue.SimpleQueue()
        self._may_begin = threading.Semaphore(GROUPS_BEGUN_MAX)
        self._begun: deque[_Group] = deque()  # in the order in which they become durable
        self._group_lock = threading.Lock()
        # Removals for the committer; none of them says that a group may have been written.
        self._ready: queue.SimpleQueue[Sequence[DropSsd] | None] = queue.SimpleQueue()
        self._starter = threading.Thread(target=self._start_loop, name="ssd-start")
        self._committer = threading.Thread(target=self._commit_loop, name="ssd-commit")
        for thread in (self._starter, *self._provers, *self._writers, self._committer):
            thread.start()

    def submit_writes(self, writes: Sequence[WriteSsd]) -> None:
        """Queues writes; they become durable in this order, in groups."""
        self._writes.put(writes)

    def submit_drops(self, drops: Sequence[DropSsd]) -> None:
        """Queues removals.

        No write of their keys may be out; one that is submitted later ends later.
        """
        self._ready.put(drops)

    def suspect(self) -> None:
        """A block was corrupt: every one that is written from now on is proven.

        Called on any thread.
        """
        with self._group_lock:
            known, self.proves_all = self.proves_all, True
        if not known:
            log.warning("every block is verified before it is written to SSD, until a restart")

    def look(self) -> None:
        """Fails where data file or index are not to be found again under their names."""
        if lost := self._lost():
            self._fail(lost)

    def close(self) -> None:
        """Ends the threads after what they have in hand."""
        self._writes.put(None)
        self._starter.join()
        for runs, threads in (
            (self._begun_runs, self._provers),
            (self._proven_runs, self._writers),
        ):
            for _ in threads:
                runs.put(None)
            for thread in threads:
                thread.join()
        self._ready.put(None)
        self._committer.join()

    def _start_loop(self) -> None:
        for writes in self._groups():
            runs = [] if self.failed else list(ssd_block.runs_of(writes, RUN_BYTES))
            group = _Group(writes, len(runs), sampled=len(self._begun) >= GROUPS_BEHIND)
            self._begun.append(group)
            for run in runs:
                self._begun_runs.put(_Run(run, group, {}))
            if not runs:
                self._ready.put(())

    def _groups(self) -> Iterator[list[WriteSsd]]:
        """What is queued, in parts within the bounds of a group; ends at close."""
        waiting: deque[WriteSsd] = deque()
        while waiting or self._take_writes(waiting):
            self._may_begin.acquire()
            group: list[WriteSsd] = []
            nbytes = 0
            while waiting and nbytes < GROUP_BYTES and len(group) < GROUP_WRITES:
                group.append(waiting.popleft())
                nbytes += group[-1].nbytes
                if not waiting and not self._writes.empty():
                    self._take_writes(waiting)
            yield group

    def _take_writes(self, waiting: deque[WriteSsd]) -> bool:
        """Waits for writes to be queued; False if none will be."""
        writes = self._writes.get()
        if writes is None:
            self._writes.put(None)  # for the next one who asks
            return False
        waiting.extend(writes)
        return True

    def _commit_loop(self) -> None:
        ended = False
        drops: list[DropSsd] = []
        while not ended:
            ended = self._wait_for_work(drops)
            groups = list(self._groups_written())
            # Until nothing waits: removals that came before a group are committed with it.
            while not (ended or self._ready.empty()):
                ended = self._wait_for_work(drops)
                groups += self._groups_written()
            if not groups and not (drops and (ended or not self._begun)):
                continue
            bad = {place: why for group in groups for place, why in group.bad.items()}
            writes: list[WriteSsd] = []
            corrupt: list[WriteSsd] = []
            for op in (op for group in groups for op in group.writes):
                (corrupt if bad.get(id(op)) is IoOutcome.CORRUPT else writes).append(op)
            if corrupt:  # whatever becomes of the others
                self._post(partial(self._report_group, (), (), (), corrupt))
            try:
                self._commit(drops, writes, bad)
            except Exception:  # a bug; without this thread every writer would wait for ever
                log.exception("a group of changes failed")
                self._fail("a bug; the log has it")
                self._report_lost(drops, writes)
            drops = []
            for _ in groups:
                self._may_begin.release()

    def _groups_written(self) -> Iterator[_Group]:
        """The groups whose data has ended, in their order."""
        while self._begun and not self._begun[0].running:
            yield self._begun.popleft()

    def _wait_for_work(self, drops: list[DropSsd]) -> bool:
        """Adds the removals that came; True if this was the last work."""
        while (ready := self._ready.get()) is not None:
            drops += ready
            if self._ready.empty():
                return False
        return True

    def _commit(
        self, drops: Sequence[DropSsd], writes: Sequence[WriteSsd], bad: dict[int, IoOutcome]
    ) -> None:
        bad = self._synced(writes, bad)
        changes: list[tuple[bytes, bytes | None]] = [(op.key, None) for op in drops]
        kept = [op for op in writes if id(op) not in bad]
        changes += [(op.key, op.record.encode()) for op in kept]
        try:
            faultpoint("ssd.index")
            self.index.apply(changes, max((op.record.sequence for op in kept), default=0))
            faultpoint("ssd.indexed")
        except (lmdb.Error, OSError) as error:
            if is_full(error, self.index.path):
                self._put_off(writes, drops, error)
            else:
                self._fail(f"index commit: {error}")
                self._report_lost(drops, writes)
            return
        if lost := self._lost():
            self._fail(lost)
            self._report_lost(drops, writes)
            return
        if self.full and changes:
            log.info("SSD index has room again")
            self.full = ""
        failed = [op for op in writes if id(op) in bad]
        self._post(lambda: self._report_group(failed, kept, drops))

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
            self._ready.put(again)
        refused = [op for op in drops if op.row < 0]
        self._post(lambda: self._report_group(writes, (), refused))

    def _report_lost(self, drops: Sequence[DropSsd], writes: Sequence[WriteSsd]) -> None:
        self._post(lambda: self._report_group(writes, (), (), stuck=drops))

    def _synced(
        self, writes: Sequence[WriteSsd], bad: dict[int, IoOutcome]
    ) -> dict[int, IoOutcome]:
        """Syncs what is written; by id, why a request's data is not on the medium."""
        if self.failed or not writes:
            return {id(op): IoOutcome.FAILED for op in writes}
        try:
            faultpoint("ssd.sync")
            self.file.sync()
        except OSError as error:
            # After a failed fdatasync the kernel has forgotten which pages were dirty: what this
            # file holds is unknown until it is written again.
            self._fail(f"fdatasync: {error}")
            return {id(op): IoOutcome.FAILED for op in writes}
        return bad

    def _prove_loop(self) -> None:
        while (run := self._begun_runs.get()) is not None:
            if self._carried_out(self._prove, run):
                self._proven_runs.put(run)
            else:
                self._end_run(run)

    def _write_loop(self) -> None:
        while (run := self._proven_runs.get()) is not None:
            self._carried_out(self._write, run)
            self._end_run(run)

    def _carried_out(self, step: Callable[[_Run], None], run: _Run) -> bool:
        try:
            step(run)
        except Exception:  # a bug; without its end the group would be waited for for ever
            log.exception("a run of writes failed")
            self._fail("a bug; the log has it")
            for op in run.writes:
                run.bad.setdefault(id(op), IoOutcome.FAILED)
            return False
        return True

    def _end_run(self, run: _Run) -> None:
        group = run.group
        with self._group_lock:
            group.bad |= run.bad
            group.running -= 1
            if group.running:
                return
        self._ready.put(())

    def _write(self, run: _Run) -> None:
        """Writes data; notes those requests whose data is not on the medium."""
        first = run.writes[0]
        try:
            faultpoint("ssd.data")
            self.file.write(ssd_block.slots_of(run.writes, self._memory), first.ssd_offset)
        except OSError as error:
            if len(run.writes) > 1:  # the others of the run may find sound places
                for op in run.writes:
                    self._write(run._replace(writes=[op]))
                return
            log.error("SSD write at byte %d failed: %s", first.ssd_offset, error)
            run.bad.setdefault(id(first), IoOutcome.FAILED)  # a corrupt one stays corrupt

    def _prove(self, run: _Run) -> None:
        """Notes those blocks whose bytes in DRAM are not those of the commit."""
        for op in run.writes:
            if run.group.sampled and not self.proves_all and random.randrange(SAMPLE):
                continue
            if not self._proven(op):
                run.bad[id(op)] = IoOutcome.CORRUPT
                self.suspect()

    def _proven(self, op: WriteSsd) -> bool:
        """Whether the bytes in DRAM are those of the commit."""
        block = self._memory[op.dram_offset : op.dram_offset + op.nbytes]
        if ssd_block.verify(block, op.record.checksums):
            return True
        log.error("block %s in DRAM is not what was committed: dropped", op.key.hex()[:16])
        return False

    def _lost(self) -> str:
        return self.file.lost() or self.index.lost()

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
        stuck: Sequence[DropSsd] = (),
    ) -> None:
        try:
            if failed:
                self._reports.writes_done(failed, ok=False)
            if kept:
                self._reports.writes_done(kept, ok=True)
            if corrupt:
                self._reports.writes_corrupt(corrupt)
            if drops:
                self._reports.drops_done(drops, ok=True)
            if stuck:
                self._reports.drops_done(stuck, ok=False)
        finally:  # what follows from the reports is outstanding by now
            self._ended(sum(map(len, (failed, kept, drops, corrupt, stuck))))
