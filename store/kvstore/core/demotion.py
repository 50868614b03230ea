"""Demotion: which blocks in DRAM go to SSD, in which order, and which are passed over."""

from collections import deque

import numpy as np

from kvstore.core.admission import make_admission
from kvstore.core.table import NOT_ADMITTED, DramState, Mask, Rows, SsdState
from kvstore.core.tiering import Tiering


class Demotion:
    """The queue of blocks to be written, behind the admission policy.

    A block that is passed over keeps its place in DRAM like any other, may leave it without a
    copy on SSD, which is counted, and is asked about again when it is used. No block is written
    before those that it continues: they are admitted with it.
    """

    def __init__(self, tiering: Tiering) -> None:
        self.blocks = tiering.blocks
        self.tiering = tiering
        self.queue: deque[int] = deque()
        self._any_passed_over = False
        self._policy = make_admission(self.blocks.config.ssd_admission, self.blocks.table, self)

    def stored(self, rows: Rows, durable: Mask) -> None:
        """Blocks became readable in DRAM; those asked to be ``durable`` are written in any case."""
        blocks, table = self.blocks, self.blocks.table
        if not (blocks.ssd and len(rows)):
            return
        admitted = self._policy.stored(rows, blocks.ghosts.was_evicted(table.joined(rows)))
        admitted |= durable | (table.ssd_children[rows] > 0)
        if not admitted.all():
            self._any_passed_over = True
            table.attempts[rows[~admitted]] = NOT_ADMITTED
        self.queue.extend(rows[admitted].tolist())

    def used(self, rows: Rows) -> None:
        """Blocks were used: what was passed over may be worth its write now."""
        if self.blocks.ssd and len(rows):
            self._admit(rows[self._policy.used(rows, self._passed_over(rows))])

    def insist(self, rows: Rows) -> None:
        """Has those of the blocks written that were passed over."""
        self._admit(rows[self._passed_over(rows)])

    def check(self) -> None:
        """AssertionError if a block was passed over whose children are on SSD."""
        rows = np.flatnonzero(self.blocks.table.ssd_children)
        assert not self._passed_over(rows).any(), "blocks on SSD without those that they continue"

    def _admit(self, rows: Rows) -> None:
        self.blocks.table.attempts[rows] = 0
        self.queue.extend(rows.tolist())

    def with_ancestors(self, rows: Rows) -> Rows:
        """``rows``, behind those blocks that they continue and that were passed over."""
        before = self._before(rows) if self._any_passed_over else rows[:0]
        if not len(before):
            return rows
        self.blocks.table.attempts[before] = 0
        return np.concatenate((before, rows))

    def _before(self, rows: Rows) -> Rows:
        table = self.blocks.table
        levels = []
        above = table.parent[rows].astype(np.int64)
        while len(above):
            above = np.unique(above[above >= 0])
            above = above[self._passed_over(above)]
            levels.append(above)
            above = table.parent[above].astype(np.int64)
        return np.concatenate(levels[::-1]) if levels else rows[:0]

    def _passed_over(self, rows: Rows) -> Mask:
        table = self.blocks.table
        over: Mask = table.attempts[rows] == NOT_ADMITTED
        over &= table.dram_state[rows] == DramState.LIVE
        over &= table.ssd_state[rows] == SsdState.NONE
        return over

    # SsdSpace

    def giving_way(self, rows: Rows) -> tuple[int, Rows]:
        """Room for these rows behind those that are queued already, and the next victims."""
        blocks = self.blocks
        if not (blocks.ssd and len(rows)):
            return len(rows), rows[:0]
        slot_bytes = int(blocks.slot_bytes[blocks.table.namespace[rows[0]]])
        room = blocks.ssd.room(slot_bytes) + blocks.drops_out - self.tiering.ahead(slot_bytes)
        free = max(0, room - len(self.queue))
        if free >= len(rows):
            return len(rows), rows[:0]
        return free, blocks.ssd_policy.select(len(rows) - free, self.tiering.may_leave_ssd)
