"""What an eviction policy is, and the window from which exact, leaf-only choices are made."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore.core.column import column
from kvstore.core.forest import closed_under_children, local_parents, raise_above_children
from kvstore.core.table import LIVE, Mask, Rows, Table
from kvstore.core.types import Tier

Eligible = Callable[[Rows], Mask]

RANK_MAX = 1 << 42
_DEPTH_BITS = 20
_WINDOW_MIN = 1024
_NONE: Rows = np.empty(0, dtype=np.int64)


class EvictionPolicy(ABC):
    """Decides which readable blocks of one tier go first. Rows of a call are in chain order.

    A policy never chooses a block before a child of it that is in the same tier, nor one that
    the caller's ``eligible`` refuses. It hears of blocks that come and are used; those that went
    it finds out by itself.
    """

    def __init__(self, table: Table, tier: Tier) -> None:
        self.table = table
        self.tier = tier
        # A number below RANK_MAX a row: smaller goes first.
        self.rank: npt.NDArray[np.int64] = column(table.rows_max, np.int64)

    def members(self) -> Rows:
        """The readable blocks of the tier."""
        return np.flatnonzero(self.table.state_in(self.tier) == LIVE)

    def in_order(self, rows: Rows) -> Rows:
        """These blocks by rank, but children before their parents."""
        up = local_parents(rows, self.table.parent, self.table.scratch)
        # The low bits put a block right behind the child it waits for, before the next rank.
        rank = raise_above_children(self.rank[rows] << _DEPTH_BITS, up)
        ordered: Rows = rows[np.argsort(rank, kind="stable")]
        return ordered

    @abstractmethod
    def inserted(self, rows: Rows, returning: Mask | None = None) -> None:
        """Blocks became readable in the tier. ``returning``: those evicted not long ago."""

    @abstractmethod
    def touched(self, rows: Rows) -> None:
        """Blocks were used."""

    @abstractmethod
    def select(self, count: int, eligible: Eligible) -> Rows:
        """Up to ``count`` blocks to remove, in an order in which children come first."""


class RankWindow:
    """The blocks of a tier with the smallest ranks, sorted, and consumed from the front.

    Blocks that come or are used get ranks above all that are in the window, so it stays exact
    until it is used up: then it is taken anew from all blocks. Blocks that may not go yet are
    remembered and asked for again the next time. Where hardly any block may go, these are found
    without the window: it would be gone through to its end, and taken anew, for each choice.
    """

    def __init__(self, policy: EvictionPolicy, floor: int = 0) -> None:
        self._policy = policy
        self._floor = floor  # ranks below are another window's
        self._rows = _NONE
        self._position = 0
        self._skipped = _NONE
        self._top = -1  # ranks up to this one are in the window

    def select(
        self, count: int, eligible: Eligible, members: Callable[[], Rows] | None = None
    ) -> Rows:
        """The first ``count`` blocks in order of rank, children before parents."""
        if len(self._skipped) <= self._few(count):
            chosen = self._from_window(count, eligible)
            if len(chosen) == count:
                return chosen
        rows = members() if members else self._policy.members()
        able = rows[eligible(rows)]
        if len(able) <= self._few(count):
            return self._leaves_first(able, count)
        chosen, complete = self._from_window(count, eligible), False
        while len(chosen) < count and not complete:
            complete = self._refill(count, rows)
            chosen = self._from_window(count, eligible)
        return chosen

    def _few(self, count: int) -> int:
        """As many blocks as may be put in order for a choice without a window."""
        return max(_WINDOW_MIN, 4 * count)

    def _from_window(self, count: int, eligible: Eligible) -> Rows:
        step = max(64, 2 * count)
        while True:
            ahead = self._rows[self._position : self._position + step]
            self._position += len(ahead)
            chunk = self._still_valid(np.concatenate((self._skipped, ahead)))
            self._skipped = chunk
            chosen = self._leaves_first(chunk[eligible(chunk)], count)
            if len(chosen) >= count or self._position >= len(self._rows):
                return chosen
            step *= 2

    def _still_valid(self, rows: Rows) -> Rows:
        policy = self._policy
        live = policy.table.state_in(policy.tier)[rows] == LIVE
        rank = policy.rank[rows]
        valid: Rows = rows[live & (rank <= self._top) & (rank >= self._floor)]
        return valid

    def _leaves_first(self, rows: Rows, count: int) -> Rows:
        """Of blocks that may go as far as they themselves are concerned."""
        policy, table = self._policy, self._policy.table
        children = table.children_in(policy.tier)
        may_go = closed_under_children(rows, table.parent, children, table.scratch)
        chosen: Rows = policy.in_order(rows[may_go])[:count]
        return chosen

    def _refill(self, count: int, rows: Rows) -> bool:
        """A larger window than before; True if it now has every block, all of ``rows``."""
        policy = self._policy
        size = max(_WINDOW_MIN, 4 * count, len(rows) // 8, 4 * len(self._rows))
        rank = policy.rank[rows]
        if size < len(rows):
            part = np.argpartition(rank, size - 1)[:size]
            rows, rank = rows[part], rank[part]
            complete = False
        else:
            complete = True
        order = np.argsort(rank, kind="stable")
        self._rows, self._skipped, self._position = rows[order], _NONE, 0
        self._top = int(rank[order[-1]]) if len(order) else -1
        return complete
