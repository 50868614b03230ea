"""S3-FIFO: new blocks pass through a small queue; only those used again reach the main one.

After Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023; here with the
choice restricted to leaves, and with the node's ghosts in place of a ghost queue.
"""

import numpy as np
import numpy.typing as npt

from kvstore.core.column import column
from kvstore.core.eviction.base import RANK_MAX, Eligible, EvictionPolicy, RankWindow
from kvstore.core.table import Mask, Rows, Table
from kvstore.core.types import Tier

_MAIN = RANK_MAX // 2  # ranks from here on are in the main queue
_USES_MAX = 3
_SMALL_SHARE = 10  # the small queue is a tenth of the blocks
_ROUNDS_MAX = 2 * _USES_MAX + 2


class S3FifoPolicy(EvictionPolicy):
    """Uses only count up; queues are sorted by the time of entry, which is the rank."""

    def __init__(self, table: Table, tier: Tier) -> None:
        super().__init__(table, tier)
        self._uses: npt.NDArray[np.uint8] = column(table.rows_max, np.uint8)
        self._clock = 0
        self._small = RankWindow(self)
        self._main = RankWindow(self, _MAIN)

    def inserted(self, rows: Rows, returning: Mask | None = None) -> None:
        """Blocks that gave way not long ago go to the main queue at once."""
        self._uses[rows] = 0
        self._enter(rows, main=False)
        if returning is not None and returning.any():
            self._enter(rows[returning], main=True)

    def touched(self, rows: Rows) -> None:
        """One more use, up to three."""
        self._uses[rows] = np.minimum(self._uses[rows] + 1, _USES_MAX)

    def select(self, count: int, eligible: Eligible) -> Rows:
        """Leaves of the queue that is over its share; used ones get another round instead."""
        chosen = self._choose(count, eligible)
        for _ in range(_ROUNDS_MAX):
            used = chosen[self._uses[chosen] > 0]
            if not len(used):
                break
            self._spare(used)
            chosen = self._choose(count, eligible)
        return chosen

    def _choose(self, count: int, eligible: Eligible) -> Rows:
        small, main = self._members(main=False), self._members(main=True)
        queues = [(self._small, small), (self._main, main)]
        if len(small) * _SMALL_SHARE < len(small) + len(main):
            queues.reverse()
        (first, members), (second, others) = queues
        chosen = first.select(count, eligible, lambda: members)
        if len(chosen) == count:
            return chosen
        return np.concatenate(
            (chosen, second.select(count - len(chosen), eligible, lambda: others))
        )

    def _spare(self, rows: Rows) -> None:
        """From the small queue into the main one without its uses, or round it with one less."""
        self._uses[rows] = np.where(self.rank[rows] < _MAIN, 0, self._uses[rows] - 1)
        self._enter(rows, main=True)

    def _enter(self, rows: Rows, *, main: bool) -> None:
        """The last row of the call comes out first: it is the deepest of its chain."""
        base = self._clock + (_MAIN if main else 0)
        self.rank[rows] = np.arange(base + len(rows), base, -1)
        self._clock += len(rows)

    def _members(self, *, main: bool) -> Rows:
        rows = self.members()
        queue: Rows = rows[(self.rank[rows] >= _MAIN) == main]
        return queue
