"""Least recently used leaf first, exact."""

import numpy as np

from kvstore.core.eviction.base import Eligible, EvictionPolicy, RankWindow
from kvstore.core.table import Mask, Rows, Table
from kvstore.core.types import Tier


class LruPolicy(EvictionPolicy):
    """Rank is the time of the last use; within one use, deeper blocks count as older."""

    def __init__(self, table: Table, tier: Tier) -> None:
        super().__init__(table, tier)
        self._clock = 0
        self._window = RankWindow(self)

    def inserted(self, rows: Rows, returning: Mask | None = None) -> None:
        """A block that comes was just used."""
        del returning
        self.touched(rows)

    def touched(self, rows: Rows) -> None:
        """The last row of the call becomes the oldest of them."""
        self.rank[rows] = np.arange(self._clock + len(rows), self._clock, -1)
        self._clock += len(rows)

    def select(self, count: int, eligible: Eligible) -> Rows:
        """The least recently used leaves, and their parents once these are leaves."""
        return self._window.select(count, eligible)
