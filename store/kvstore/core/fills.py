"""Fills: blocks that clients are writing, whole or in shards, until they commit or give up."""

import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import Blocks
from kvstore.core.leases import Reservation, ShardedFill
from kvstore.core.table import DramState, Mask, Rows
from kvstore.core.tiering import Tiering
from kvstore.core.types import AckLevel


class Fills:
    """FILLING rows. A block with one shard belongs to one reservation, so only blocks with
    several need an entry of their own here.
    """

    def __init__(self, tiering: Tiering) -> None:
        self.blocks: Blocks = tiering.blocks
        self.tiering = tiering
        self._sharded: dict[int, ShardedFill] = {}
        self.completed: Rows = np.zeros(0, dtype=np.int64)  # by the last commit

    def start(self, reservation: Reservation, rows: Rows, now: float) -> None:
        """These rows, just FILLING, are filled under this reservation."""
        self.blocks.table.attempts[rows] = 0
        self.blocks.forget_checksums(rows)
        if reservation.num_shards > 1:
            deadline = now + self.blocks.config.shard_timeout_s
            for row in rows.tolist():
                fill = ShardedFill(reservation.num_shards, deadline)
                fill.open.add(reservation.shard_index)
                self._sharded[row] = fill

    def join(self, reservation: Reservation, row: int, now: float) -> bool:
        """Takes another shard of a block that others fill; False if that cannot be."""
        fill = self._sharded.get(row)
        shard = reservation.shard_index
        if fill is None or fill.failed or fill.num_shards != reservation.num_shards:
            return False
        if shard in fill.open or shard in fill.checksums:
            return False
        fill.open.add(shard)
        fill.deadline = now + self.blocks.config.shard_timeout_s
        return True

    def commit(
        self, reservation: Reservation, rows: Rows, sums: npt.NDArray[np.uint64], now: float
    ) -> Mask:
        """Shards are filled, in chain order; which of them count. Complete blocks are visible."""
        table = self.blocks.table
        good: Mask = table.dram_state[rows] == DramState.FILLING
        self._leave(rows[~good], reservation)
        filled = rows[good]
        if reservation.num_shards == 1:
            table.checksum[filled] = sums[good]
        else:
            pairs = zip(filled.tolist(), sums[good].tolist(), strict=True)
            complete = [row for row, sum_ in pairs if self._add(row, reservation, sum_, now)]
            filled = np.array(complete, dtype=np.int64)
        if len(filled):
            self.blocks.show_dram(filled, DramState.FILLING)
            self.blocks.count("stored_blocks", len(filled))
        self.completed = filled
        return good

    def give_back(self, rows: Rows, reservation: Reservation) -> None:
        """The client does not touch these slots any more and did not fill them."""
        table = self.blocks.table
        dead = table.dram_state[rows] == DramState.DEAD
        self._leave(rows[dead], reservation)
        rows = rows[~dead]
        if reservation.num_shards > 1:
            self._fail(rows)
            self._leave(rows, reservation)
        elif len(rows):
            self.blocks.free_dram(rows, DramState.FILLING)
            self.blocks.discard(rows)

    def quarantine(self, rows: Rows, reservation: Reservation) -> None:
        """The client may still write into these slots, and never commits them."""
        rows = rows[self.blocks.table.dram_state[rows] == DramState.FILLING]
        if reservation.num_shards > 1:
            self._fail(rows)
        else:
            self._kill(rows)

    def tick(self, now: float) -> None:
        """Gives up blocks whose missing shards nobody brings."""
        late = [r for r, f in self._sharded.items() if not f.open and f.deadline <= now]
        rows = np.array(late, dtype=np.int64)
        self._fail(rows)
        self._leave(rows, None)

    def next_deadline(self) -> float | None:
        """Of the blocks that wait for shards which nobody fills."""
        return min((f.deadline for f in self._sharded.values() if not f.open), default=None)

    def check(self) -> None:
        """AssertionError if an entry has no row that is being filled."""
        states = self.blocks.table.dram_state
        for row, fill in self._sharded.items():
            expected = DramState.DEAD if fill.failed else DramState.FILLING
            assert states[row] == expected, f"row {row} is no fill in shards"

    def _add(self, row: int, reservation: Reservation, checksum: int, now: float) -> bool:
        fill = self._sharded[row]
        fill.open.discard(reservation.shard_index)
        fill.checksums[reservation.shard_index] = checksum
        fill.deadline = now + self.blocks.config.shard_timeout_s
        if not fill.complete:
            return False
        del self._sharded[row]
        ordered = tuple(fill.checksums[shard] for shard in range(fill.num_shards))
        self.blocks.shard_checksums[row] = ordered
        return True

    def _kill(self, rows: Rows) -> None:
        if len(rows):
            self.blocks.move_dram(rows, DramState.FILLING, DramState.DEAD)
            self.blocks.held_dead.update(rows.tolist())

    def _fail(self, rows: Rows) -> None:
        for row in rows.tolist():
            self._sharded[row].failed = True
        if len(rows):
            self._kill(rows)
            self.tiering.on_settled(rows, AckLevel.UNSPECIFIED)

    def _leave(self, rows: Rows, reservation: Reservation | None) -> None:
        """A client lets go of DEAD slots; the last one frees them."""
        for row in rows.tolist():
            fill = self._sharded.get(row)
            if fill is not None and reservation is not None:
                fill.open.discard(reservation.shard_index)
            if fill is None or not fill.open:
                self.blocks.held_dead.discard(row)
                self._sharded.pop(row, None)
        self.tiering.release_dead(rows)
