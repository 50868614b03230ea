"""A block is written to SSD if it is used more often than the copy that gives way to it."""

import numpy as np

from kvstore.core.admission.base import AdmissionPolicy, SsdSpace
from kvstore.core.admission.sketch import FrequencySketch, Words
from kvstore.core.distinct import distinct
from kvstore.core.table import Mask, Rows, Table

WIDTH_MIN, WIDTH_MAX = 1 << 18, 1 << 24  # counters of one byte, four times as many in all
SAMPLE_PER_BLOCK = 10
_SAMPLE_MIN = 10_000


class ReusePolicy(AdmissionPolicy):
    """TinyLFU (see the sketch) in front of the SSD's own eviction policy.

    Other than TinyLFU it lets a newcomer in at a tie, if that was used before: the KV of a
    conversation is wanted in bursts. While the SSD has free space every block is written. Uses are
    those that the node hears of: stored, acquired, stored again. A use of a chain is one of each
    of its blocks, so that a block counts at least as often as those behind it.
    """

    def __init__(self, table: Table, ssd: SsdSpace) -> None:
        super().__init__(table, ssd)
        # A counter for each block that there can be: with fewer, keys that share all of theirs
        # with others look used, and everything is let in.
        self._width = min(WIDTH_MAX, max(WIDTH_MIN, 1 << (table.rows_max - 1).bit_length()))
        self._sketch = FrequencySketch(self._width)

    def stored(self, rows: Rows, returning: Mask) -> Mask:
        """Those that are worth more than what goes for them."""
        del returning  # the sketch remembers longer
        self._count(rows)
        return self._worth(rows)

    def used(self, rows: Rows, passed_over: Mask) -> Mask:
        """Those that have become worth more than what goes for them."""
        self._count(rows)
        admitted = passed_over.copy()
        if passed_over.any():
            admitted[passed_over] = self._worth(rows[passed_over])
        return admitted

    def _count(self, rows: Rows) -> None:
        blocks = min(len(self.table), self._width)
        sample = max(_SAMPLE_MIN, SAMPLE_PER_BLOCK * blocks)
        self._sketch.add(self._words(distinct(rows)), sample)

    def _worth(self, rows: Rows) -> Mask:
        free, victims = self.ssd.giving_way(rows)
        worth = np.zeros(len(rows), dtype=np.bool_)
        worth[:free] = True
        rivals = slice(free, free + len(victims))
        theirs = self._sketch.estimate(self._words(victims))
        ours = self._sketch.estimate(self._words(rows[rivals]))
        # Of two that were used alike the newcomer is wanted now, unless this is its first use.
        worth[rivals] = (ours > theirs) | ((ours == theirs) & (ours > 1))
        # What is behind a block that stays out would be of no use without it.
        return np.logical_and.accumulate(worth)

    def _words(self, rows: Rows) -> Words:
        return self.table.keys[rows].view("<u8")
