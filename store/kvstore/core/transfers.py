"""Transfers: write-behind to SSD, loads from it, removals, and what follows when they end."""

from collections.abc import Sequence

import numpy as np

from kvstore.core.demotion import Demotion
from kvstore.core.effects import DropSsd, ReadSsd, WriteSsd
from kvstore.core.slots import Offsets
from kvstore.core.ssd_record import SsdRecord
from kvstore.core.table import DramState, Rows, SsdState
from kvstore.core.tiering import Tiering
from kvstore.core.types import AckLevel, EndReason, IoOutcome
from kvstore.errors import InternalError

READS_STARTED_SHARE = 4  # of the reads that may be out, one part is started together
WRITES_OUT_SHARE = 4  # of the bytes on SSD, one part may be being written


class Transfers:
    """The disk requests that are out. One row has at most one of them at a time."""

    def __init__(self, tiering: Tiering) -> None:
        self.tiering = tiering
        self.blocks = tiering.blocks
        self._reads: dict[int, ReadSsd] = {}
        self._writes: dict[int, WriteSsd] = {}
        self.demotion = Demotion(tiering)
        self._dirty = self.demotion.queue
        self._write_bytes = 0
        self._sequence = 0

    @property
    def idle(self) -> bool:
        """No disk request is out or due."""
        return not (self._reads or self._writes or self.blocks.drops_out or self._dirty)

    @property
    def read_room(self) -> int:
        """Reads that may be started now."""
        return self.blocks.config.reads_in_flight_max - len(self._reads)

    @property
    def reads_worthwhile(self) -> bool:
        """Whether there is room for several reads, or none is out: one costs as much as several."""
        limit = self.blocks.config.reads_in_flight_max
        return not self._reads or self.read_room >= limit // READS_STARTED_SHARE

    def restored(self, sequence: int) -> None:
        """Records up to this sequence are on SSD already."""
        self._sequence = max(self._sequence, sequence)

    # Write-behind

    @property
    def write_bytes_max(self) -> int:
        """Bytes of writes that may be out.

        A part of the tier, since what they replace is removed before they begin: a node that is
        killed then has lost no more than that.
        """
        config = self.blocks.config
        return min(config.writes_in_flight_bytes_max, config.ssd_bytes // WRITES_OUT_SHARE)

    def pump_writes(self) -> None:
        """Starts the writes that are due, as far as limits and space go."""
        blocks, config = self.blocks, self.blocks.config
        while self._dirty and len(self._writes) < config.writes_in_flight_max:
            rows = self._next_dirty(config.writes_in_flight_max - len(self._writes))
            if rows is None:
                return
            if not len(rows):
                continue
            chained = self.demotion.with_ancestors(rows)
            if len(chained) > len(rows):
                self._dirty.extendleft(reversed(chained.tolist()))
                continue
            slot_bytes = int(blocks.slot_bytes[blocks.table.namespace[rows[0]]])
            before = blocks.table.parent[rows].astype(np.int64)
            offsets = self.tiering.allocate_ssd(slot_bytes, len(rows), keep=before)
            self._start_writes(rows[: len(offsets)], offsets)
            rest = rows[len(offsets) :]
            if not len(rest):
                continue
            if self._reads or self._writes or blocks.drops_out:
                self._dirty.extendleft(reversed(rest.tolist()))
                return
            self._give_up(rest)

    def _next_dirty(self, count: int) -> Rows | None:
        """Due rows of one slot size within the limit of bytes; None: the limit is reached."""
        table, config = self.blocks.table, self.blocks.config
        taken = dict.fromkeys(self._dirty.popleft() for _ in range(min(count, len(self._dirty))))
        rows = np.fromiter(taken, dtype=np.int64)
        due = (table.dram_state[rows] == DramState.LIVE) & (table.ssd_state[rows] == SsdState.NONE)
        rows = rows[due & (table.attempts[rows] < config.write_attempts_max)].copy()
        slots = self.blocks.slot_bytes[table.namespace[rows]]
        fits = (slots == slots[:1]) & (np.cumsum(slots) + self._write_bytes <= self.write_bytes_max)
        fits[:1] |= not self._writes
        if len(rows) and not fits.all():
            first = int(np.argmin(fits))
            self._dirty.extendleft(reversed(rows[first:].tolist()))
            rows = rows[:first]
            if not first:
                return None
        due_now: Rows = rows
        return due_now

    def _start_writes(self, rows: Rows, offsets: Offsets) -> None:
        blocks, table = self.blocks, self.blocks.table
        if not len(rows):
            return
        blocks.take_ssd(rows, offsets, SsdState.WRITING)
        columns = zip(
            rows.tolist(),
            table.namespace[rows].tolist(),
            table.key_list(rows),
            table.parent_keys(rows),
            table.dram_offset[rows].tolist(),
            offsets.tolist(),
            strict=True,
        )
        for row, number, key, parent, dram_offset, ssd_offset in columns:
            self._sequence += 1
            space = blocks.namespaces.numbered(number)
            record = SsdRecord(
                key,
                space.root,
                parent,
                space.block_bytes,
                ssd_offset,
                blocks.checksums(row),
                self._sequence,
            )
            write = WriteSsd(row, dram_offset, space.block_bytes, record)
            self._writes[row] = write
            blocks.out.writes.append(write)
        self._write_bytes += int(blocks.slot_bytes[table.namespace[rows]].sum())

    def writes_done(self, ops: Sequence[WriteSsd], ok: bool, level: AckLevel) -> None:
        """Writes ended: their blocks are durable, or are tried again a few times."""
        rows = self._ended(ops)
        blocks, table = self.blocks, self.blocks.table
        live = table.dram_state[rows] == DramState.LIVE
        if ok:
            blocks.show_ssd(rows[live])
            blocks.drop_ssd(rows[~live], EndReason.PURGED, SsdState.WRITING)
            blocks.count("ssd_written_blocks", len(rows))
            self.tiering.on_settled(rows[live], level)
        else:
            blocks.free_ssd(rows, SsdState.WRITING)
            blocks.count("ssd_write_errors", len(rows))
            self._retry(rows[live])
        self.tiering.release_dead(rows[~live])
        self.tiering.evict_leaving()

    def writes_corrupt(self, ops: Sequence[WriteSsd]) -> None:
        """The bytes in DRAM have other checksums than their commit: the blocks are dropped.

        A slot is quarantined as long as a lease is on it.
        """
        rows = self._ended(ops)
        blocks, table = self.blocks, self.blocks.table
        blocks.free_ssd(rows, SsdState.WRITING)
        blocks.count("commit_corrupt_blocks", len(rows))
        live = rows[table.dram_state[rows] == DramState.LIVE]
        blocks.hide_dram(live, EndReason.CORRUPT)
        blocks.move_dram(live, DramState.LIVE, DramState.DEAD)
        self.tiering.on_settled(live, AckLevel.UNSPECIFIED)
        self.tiering.release_dead(rows)

    def _ended(self, ops: Sequence[WriteSsd]) -> Rows:
        for op in ops:
            if self._writes.get(op.row) != op:
                raise InternalError(f"a write of row {op.row} ended that is not out")
            del self._writes[op.row]
        rows = np.fromiter((op.row for op in ops), dtype=np.int64, count=len(ops))
        namespaces = self.blocks.table.namespace[rows]
        self._write_bytes -= int(self.blocks.slot_bytes[namespaces].sum())
        return rows

    def _retry(self, rows: Rows) -> None:
        table = self.blocks.table
        table.attempts[rows] += np.uint8(1)
        again = table.attempts[rows] < self.blocks.config.write_attempts_max
        self._dirty.extend(rows[again].tolist())
        self._give_up(rows[~again])

    def _give_up(self, rows: Rows) -> None:
        """These blocks stay in memory only, and may be evicted from there: counted, not silent."""
        blocks = self.blocks
        blocks.table.attempts[rows] = blocks.config.write_attempts_max
        blocks.count("ssd_given_up_blocks", len(rows))
        blocks.room_version += 1
        self.tiering.on_settled(rows, AckLevel.MEMORY)

    # Loads

    def start_reads(self, rows: Rows) -> int:
        """Loads blocks of one namespace that are on SSD only; how many found a slot to go to."""
        blocks, table = self.blocks, self.blocks.table
        space = blocks.namespaces.numbered(int(table.namespace[rows[0]]))
        # What makes room may drop copies on SSD: not those that the room is for.
        table.pins[rows] += 1
        offsets = self.tiering.allocate_dram(space.slot_bytes, len(rows))
        table.pins[rows] -= 1
        rows = rows[: len(offsets)]
        if not len(rows):
            return 0
        blocks.take_dram(rows, offsets, DramState.LOADING)
        columns = zip(
            rows.tolist(),
            table.key_list(rows),
            table.ssd_offset[rows].tolist(),
            offsets.tolist(),
            strict=True,
        )
        for row, key, ssd_offset, dram_offset in columns:
            checksums = blocks.checksums(row)
            read = ReadSsd(row, key, ssd_offset, dram_offset, space.block_bytes, checksums)
            self._reads[row] = read
            blocks.out.reads.append(read)
        return len(rows)

    def reads_done(self, ops: Sequence[tuple[ReadSsd, IoOutcome]]) -> None:
        """Reads ended: verified blocks are in DRAM as well, others are dropped from SSD."""
        blocks, table = self.blocks, self.blocks.table
        for op, _ in ops:
            if self._reads.get(op.row) != op:
                raise InternalError(f"a read of row {op.row} ended that is not out")
            del self._reads[op.row]
            blocks.held_dead.discard(op.row)
        rows = np.fromiter((op.row for op, _ in ops), dtype=np.int64, count=len(ops))
        outcomes = [outcome for _, outcome in ops]
        loading = table.dram_state[rows] == DramState.LOADING
        fine = np.array([outcome is IoOutcome.OK for outcome in outcomes], dtype=np.bool_)
        good, bad = rows[loading & fine], rows[loading & ~fine]
        if len(good):
            blocks.show_dram(good, DramState.LOADING)
            blocks.count("ssd_read_blocks", len(good))
        if len(bad):
            blocks.free_dram(bad, DramState.LOADING)
            blocks.drop_ssd(bad, EndReason.CORRUPT)
        # Of a block that was purged meanwhile the space on SSD may be another's by now.
        corrupt = np.array([outcome is IoOutcome.CORRUPT for outcome in outcomes], dtype=np.bool_)
        blocks.count("corrupt_blocks", int(np.count_nonzero(loading & corrupt)))
        blocks.count("ssd_read_errors", outcomes.count(IoOutcome.FAILED))
        self.tiering.release_dead(rows[~loading])

    def drops_done(self, ops: Sequence[DropSsd], *, ok: bool) -> None:
        """The index no longer names these slots: they are free.

        Not ``ok``: their old records may still stand, so they never are, and nobody waits for them.
        """
        blocks, table = self.blocks, self.blocks.table
        # Row -1 stands for a record that the restore refused.
        rows = np.array([op.row for op in ops if op.row >= 0], dtype=np.int64)
        if not len(rows):
            return
        if not ok:
            blocks.drops_out -= len(rows)
            return
        unasked = rows[table.ssd_state[rows] != SsdState.DROPPING]
        if len(unasked):
            raise InternalError(f"the removal of row {unasked[0]} ended, but none was asked for")
        blocks.free_ssd(rows, SsdState.DROPPING)
        live = table.dram_state[rows] == DramState.LIVE
        self._dirty.extend(rows[live].tolist())
        blocks.discard(rows[~live])
