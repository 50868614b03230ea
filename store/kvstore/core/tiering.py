"""Tiering: which blocks leave DRAM and SSD when space is needed, and what happens to them then."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import Blocks
from kvstore.core.forest import closed_under_children, spread_down
from kvstore.core.slots import Offsets
from kvstore.core.table import NOT_ADMITTED, DramState, Mask, Rows, SsdState
from kvstore.core.types import AckLevel, EndReason

FREE_AHEAD_SHARE = 16  # of the slots on SSD, one part may be kept free for writes to come


class Tiering:
    """Eviction from both tiers, and purges.

    Invariant: a row with a disk request out is never removed, and its slots are not reused, until
    the request has ended. ``on_settled`` hears of blocks whose way to SSD ended, and how far
    they came.
    """

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self.on_settled: Callable[[Rows, AckLevel], None] = lambda _rows, _level: None
        self.leaving: set[int] = set()  # to leave DRAM when they are on SSD

    # Space in DRAM

    def allocate_dram(self, slot_bytes: int, count: int) -> Offsets:
        """Up to ``count`` slots, after evicting what has to go for them."""
        blocks = self.blocks
        offsets = blocks.allocate_dram(slot_bytes, count)
        wanted = count - len(offsets)
        while len(offsets) < count:
            victims = blocks.dram_policy.select(wanted, self._may_leave_dram)
            if not len(victims):
                if self._free_given_up():
                    continue
                break
            self.evict_dram(victims)
            more = blocks.allocate_dram(slot_bytes, count - len(offsets))
            # Victims of another slot size free a slot of ours only once their span is empty.
            wanted = count - len(offsets) - len(more) if len(more) else 2 * wanted
            offsets = np.concatenate((offsets, more))
        return offsets

    def _may_leave_dram(self, rows: Rows) -> Mask:
        """Unpinned blocks on SSD; and last copies where nothing better will come of them."""
        table, config = self.blocks.table, self.blocks.config
        free: Mask = (table.dram_state[rows] == DramState.LIVE) & (table.pins[rows] == 0)
        state = table.ssd_state[rows]
        given_up = (state == SsdState.NONE) & (table.ssd_children[rows] == 0)
        if self.blocks.ssd:
            given_up &= table.attempts[rows] >= config.write_attempts_max
        free &= (state == SsdState.LIVE) | given_up
        return free

    def _free_given_up(self) -> bool:
        """Drops what is on SSD behind blocks that never get there, so that these may leave DRAM.

        Only where nothing else can go: such blocks would hold their DRAM slots for ever.
        """
        blocks, table = self.blocks, self.blocks.table
        stuck = (table.attempts >= blocks.config.write_attempts_max) & (table.pins == 0)
        stuck &= (table.dram_state == DramState.LIVE) & (table.ssd_state == SsdState.NONE)
        stuck &= table.ssd_children > 0
        if not stuck.any():
            return False
        copies = np.flatnonzero(spread_down(stuck, table.parent))
        copies = copies[table.ssd_state[copies] == SsdState.LIVE]
        copies = copies[self.closed(copies, self.may_leave_ssd(copies), table.ssd_children)]
        self.evict_ssd(copies)
        return len(copies) > 0

    def may_be_dropped(self, rows: Rows) -> Mask:
        """Unpinned blocks without a write out, whatever is lost with them."""
        table = self.blocks.table
        free: Mask = (table.dram_state[rows] == DramState.LIVE) & (table.pins[rows] == 0)
        free &= (table.ssd_state[rows] == SsdState.LIVE) | (
            (table.ssd_state[rows] != SsdState.WRITING) & (table.ssd_children[rows] == 0)
        )
        return free

    def evict_dram(self, rows: Rows) -> None:
        """Removes blocks from DRAM, children before parents, and gives their slots back."""
        blocks = self.blocks
        alone = blocks.table.ssd_state[rows] != SsdState.LIVE
        passed_over = alone & (blocks.table.attempts[rows] == NOT_ADMITTED)
        last = rows[alone]
        blocks.hide_dram(rows[~passed_over], EndReason.EVICTED)
        blocks.hide_dram(rows[passed_over], EndReason.NOT_ADMITTED)
        blocks.free_dram(rows, DramState.LIVE)
        blocks.count("evicted_dram_blocks", len(rows))
        blocks.count("evicted_not_admitted_blocks", int(passed_over.sum()))
        if blocks.ssd:
            blocks.count("evicted_without_ssd_blocks", len(last) - int(passed_over.sum()))
        if len(last):
            self.on_settled(last, AckLevel.MEMORY)
            blocks.discard(last)

    def evict_leaving(self) -> None:
        """Removes from DRAM what was told to leave it and now is on SSD."""
        if not self.leaving:
            return
        table = self.blocks.table
        rows = np.fromiter(self.leaving, dtype=np.int64)
        still = table.dram_state[rows] == DramState.LIVE
        still &= table.attempts[rows] < self.blocks.config.write_attempts_max
        rows = rows[still]
        self.leaving = set(rows.tolist())
        rows = rows[self.closed(rows, self.on_ssd_too(rows), table.dram_children)]
        if len(rows):
            self.leaving.difference_update(rows.tolist())
            self.evict_dram(rows)

    def on_ssd_too(self, rows: Rows) -> Mask:
        """Unpinned blocks in DRAM that lose nothing by leaving it."""
        table = self.blocks.table
        free: Mask = (table.dram_state[rows] == DramState.LIVE) & (table.pins[rows] == 0)
        free &= table.ssd_state[rows] == SsdState.LIVE
        return free

    def closed(self, rows: Rows, eligible: Mask, children: npt.NDArray[np.int32]) -> Mask:
        """Those of the rows that may go without leaving a hole."""
        table = self.blocks.table
        return closed_under_children(rows, table.parent, children, table.scratch, eligible)

    def release_dead(self, rows: Rows) -> None:
        """Gives back those DEAD slots that neither a client nor a disk request touches."""
        blocks, table = self.blocks, self.blocks.table
        rows = rows[(table.dram_state[rows] == DramState.DEAD) & (table.pins[rows] == 0)]
        rows = rows[table.ssd_state[rows] != SsdState.WRITING]
        free = [row not in blocks.held_dead for row in rows.tolist()]
        rows = rows[np.array(free, dtype=np.bool_)]
        if len(rows):
            blocks.free_dram(rows, DramState.DEAD)
            blocks.discard(rows)

    def purge(self, rows: Rows) -> None:
        """Forgets blocks; slots still in use follow when they are let go."""
        blocks, table = self.blocks, self.blocks.table
        blocks.drop_ssd(rows[table.ssd_state[rows] == SsdState.LIVE], EndReason.PURGED)
        live = rows[table.dram_state[rows] == DramState.LIVE]
        blocks.hide_dram(live, EndReason.PURGED)
        blocks.move_dram(live, DramState.LIVE, DramState.DEAD)
        loading = rows[table.dram_state[rows] == DramState.LOADING]
        blocks.move_dram(loading, DramState.LOADING, DramState.DEAD)
        blocks.held_dead.update(loading.tolist())  # until the read has ended
        self.on_settled(live, AckLevel.MEMORY)
        self.release_dead(np.concatenate((live, loading)))

    # Space on SSD

    def may_leave_ssd(self, rows: Rows) -> Mask:
        """Copies that nobody reads or waits for; a last one only if nothing is behind it."""
        table = self.blocks.table
        state = table.dram_state[rows]
        last = (state == DramState.NONE) & (table.pins[rows] == 0)
        last &= table.dram_children[rows] == 0
        may: Mask = table.ssd_state[rows] == SsdState.LIVE
        may &= (state == DramState.LIVE) | last
        return may

    def evict_ssd(self, rows: Rows) -> None:
        """Drops copies; a block that is in DRAM as well is not written a second time."""
        table = self.blocks.table
        in_dram = rows[table.dram_state[rows] == DramState.LIVE]
        table.attempts[in_dram] = self.blocks.config.write_attempts_max
        self.blocks.drop_ssd(rows, EndReason.EVICTED)
        self.blocks.count("evicted_ssd_blocks", len(rows))

    def make_rows(self, count: int) -> None:
        """Where the table is full, evicts last copies until it has room for that many blocks."""
        missing = count - self.blocks.table.room()
        if missing > 0 and self.blocks.ssd is None:
            victims = self.blocks.dram_policy.select(missing, self._may_leave_dram)
            if len(victims):
                self.evict_dram(victims)
        elif missing > self.blocks.drops_out:
            victims = self.blocks.ssd_policy.select(missing, self._only_on_ssd)
            self.evict_ssd(victims)

    def _only_on_ssd(self, rows: Rows) -> Mask:
        may = self.may_leave_ssd(rows)
        may &= self.blocks.table.dram_state[rows] == DramState.NONE
        return may

    def allocate_ssd(self, slot_bytes: int, count: int, keep: Rows) -> Offsets:
        """Free slots; what is missing is evicted, and there once the removals are durable.

        In a large tier so is the space of the writes to come, so that they need not wait for that.
        ``keep`` are rows that stay: those that the writes continue.
        """
        blocks = self.blocks
        assert blocks.ssd is not None
        offsets = blocks.ssd.allocate(slot_bytes, count)[0]
        missing = count - len(offsets) - blocks.drops_out

        def may_leave(rows: Rows) -> Mask:
            may: Mask = self.may_leave_ssd(rows) & ~np.isin(rows, keep)
            return may

        if missing > 0:
            self.evict_ssd(blocks.ssd_policy.select(missing, may_leave))
        # Bytes of whatever class: by the slot, large blocks would go for as many small ones, and a
        # class of few blocks would take the space from itself alone.
        short = self.ahead(slot_bytes) * slot_bytes
        short -= blocks.ssd.spare_bytes + blocks.ssd.quarantined_bytes
        if short > 0:
            victims = blocks.ssd_policy.select(-(-short // slot_bytes), may_leave)
            sizes = np.cumsum(blocks.slot_bytes[blocks.table.namespace[victims]])
            self.evict_ssd(victims[: int(np.searchsorted(sizes, short)) + 1])
        return offsets

    def ahead(self, slot_bytes: int) -> int:
        """Slots of a large tier that are kept free for writes to come."""
        blocks, config = self.blocks, self.blocks.config
        assert blocks.ssd is not None
        return min(
            config.writes_in_flight_bytes_max // slot_bytes,
            2 * config.writes_in_flight_max,
            blocks.ssd.slots_max(slot_bytes) // FREE_AHEAD_SHARE,
        )
