"""The blocks of a node: one row each, numpy columns, one index from key to row.

A row lives while its block has a copy in a tier, a slot in use, or a child that names it as its
parent. A row without any copy is a *placeholder*: it keeps a chain's order for blocks that were
stored before their parent.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from kvstore.core.column import column
from kvstore.core.distinct import distinct
from kvstore.core.forest import closed_under_children
from kvstore.core.key_index import KeyIndex
from kvstore.core.keys import KEY_BYTES
from kvstore.core.ssd_record import NO_PARENT
from kvstore.core.types import Tier
from kvstore.errors import ResourceExhaustedError

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

NO_ROW = -1
_FIRST_ROWS = 1024
_STEP_ROWS_MAX = 1 << 16  # a step takes half a millisecond
_COLUMNS: dict[str, tuple[type[np.generic], int]] = {
    "namespace": (np.int32, -1),
    "parent": (np.int32, NO_ROW),
    "children": (np.int32, 0),  # rows that name this one as their parent
    "dram_children": (np.int32, 0),  # of these, with a DRAM slot in any state
    "ssd_children": (np.int32, 0),  # of these, with an SSD slot that is written or being written
    "dram_state": (np.uint8, 0),
    "ssd_state": (np.uint8, 0),
    "dram_offset": (np.int64, -1),
    "ssd_offset": (np.int64, -1),
    "pins": (np.int32, 0),
    "attempts": (np.uint8, 0),  # failed SSD writes
    "checksum": (np.uint64, 0),  # of the only shard; blocks with several keep them elsewhere
}


NOT_ADMITTED = 255  # of "attempts": passed over by the SSD admission policy
LIVE = 3  # in both tiers: readable


# Plain numbers: numpy needs 4 us more to compare with a member of an IntEnum (CPython 3.11).
class DramState:
    """What a row's DRAM slot is used for."""

    NONE: Final = 0
    FILLING: Final = 1  # reserved by a client
    LOADING: Final = 2  # being read from SSD
    LIVE: Final = LIVE
    DEAD: Final = 4  # purged, or its fill failed, while someone may still touch it


class SsdState:
    """What a row's SSD slot is used for."""

    NONE: Final = 0
    WRITING: Final = 1
    DROPPING: Final = 2  # its removal from the index is not durable yet
    LIVE: Final = LIVE


class Table:
    """Rows, their columns, and the links of the chains."""

    namespace: npt.NDArray[np.int32]
    parent: npt.NDArray[np.int32]
    children: npt.NDArray[np.int32]
    dram_children: npt.NDArray[np.int32]
    ssd_children: npt.NDArray[np.int32]
    dram_state: npt.NDArray[np.uint8]
    ssd_state: npt.NDArray[np.uint8]
    dram_offset: npt.NDArray[np.int64]
    ssd_offset: npt.NDArray[np.int64]
    pins: npt.NDArray[np.int32]
    attempts: npt.NDArray[np.uint8]
    checksum: npt.NDArray[np.uint64]

    def __init__(self, rows_max: int) -> None:
        self.rows_max = rows_max
        self.keys: npt.NDArray[np.uint8] = column((rows_max, KEY_BYTES), np.uint8)
        self.index = KeyIndex(self.keys.view("<u8"))
        self.scratch = np.zeros(0, dtype=np.int32)  # all -1 between calls
        self.capacity = 0
        self._columns = {name: column(rows_max, dtype) for name, (dtype, _) in _COLUMNS.items()}
        self._scratch: npt.NDArray[np.int32] = column(rows_max, np.int32)
        self._free: npt.NDArray[np.int32] = column(rows_max, np.int32)  # rows that were removed
        self._free_count = 0
        self._fresh = 0  # rows from here on were never used
        self._grow(min(_FIRST_ROWS, rows_max))

    def __len__(self) -> int:
        return len(self.index)

    def lookup(self, keys: Sequence[bytes]) -> Rows:
        """Rows of keys, -1 where there is none."""
        return self.index.find_all(b"".join(keys))

    def room(self) -> int:
        """Rows that can still be added."""
        return self.rows_max - len(self.index)

    def add(self, keys: Sequence[bytes], namespace: int) -> Rows:
        """New rows for distinct, unknown keys, without copies and links."""
        return self.add_joined(b"".join(keys), namespace)

    def add_joined(self, joined: bytes, namespace: int) -> Rows:
        """``add`` for n x 32 bytes of keys."""
        count = len(joined) // KEY_BYTES
        if count > self.room():
            raise ResourceExhaustedError(f"the table is full: {self.rows_max} blocks")
        again = min(count, self._free_count)
        self._free_count -= again
        used = self._free[self._free_count : self._free_count + again][::-1]
        end = self._fresh + count - again
        rows: Rows = np.concatenate((used, np.arange(self._fresh, end)), dtype=np.int64)
        self._fresh = end
        while end > self.capacity:
            step = min(max(self.capacity, 1), _STEP_ROWS_MAX)
            self._grow(min(self.capacity + step, self.rows_max))
        self.keys[rows] = np.frombuffer(joined, dtype=np.uint8).reshape(-1, KEY_BYTES)
        self.index.insert(joined, rows)
        self.namespace[rows] = namespace
        return rows

    def link(self, rows: Rows, parents: Rows) -> None:
        """Puts fresh rows (no parent, no slots) behind their parents; -1: the root."""
        self.parent[rows] = parents
        np.add.at(self.children, parents[parents >= 0], np.int32(1))

    def is_behind(self, row: int, ancestor: int) -> bool:
        """Whether ``ancestor`` is ``row`` or before it in its chain."""
        while row != NO_ROW and row != ancestor:
            row = int(self.parent[row])
        return row == ancestor

    def count_children(self, counts: npt.NDArray[np.int32], rows: Rows, change: int) -> None:
        """Adds ``change`` to a column of counts of the parents of ``rows``."""
        parents = self.parent[rows]
        # In the column's own type, else it takes twenty times as long.
        np.add.at(counts, parents[parents >= 0], np.int32(change))

    def discard_empty(self, rows: Rows) -> None:
        """Removes those of ``rows`` that nothing needs any more, and then their parents."""
        while len(rows):
            needed = self.dram_state[rows] != DramState.NONE
            needed |= self.ssd_state[rows] != SsdState.NONE
            needed |= self.pins[rows] != 0
            rows = rows[~needed]
            rows = rows[closed_under_children(rows, self.parent, self.children, self.scratch)]
            parents = self.parent[rows]
            parents = parents[parents >= 0]
            np.subtract.at(self.children, parents, np.int32(1))
            self._remove(rows)
            above = distinct(parents.astype(np.int64))
            rows = above[self.namespace[above] >= 0]

    def key(self, row: int) -> bytes:
        """The key of one row."""
        return bytes(self.keys[row])

    def joined(self, rows: Rows) -> bytes:
        """Keys of rows as one wire field."""
        return bytes(self.keys[rows].data)

    def key_list(self, rows: Rows) -> list[bytes]:
        """Keys of rows as objects."""
        joined = self.joined(rows)
        return [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]

    def parent_keys(self, rows: Rows) -> list[bytes]:
        """Keys of the rows' parents; NO_PARENT at a root."""
        parents = self.parent[rows].astype(np.int64)
        keys = self.key_list(parents)
        for i in np.flatnonzero(parents < 0).tolist():
            keys[i] = NO_PARENT
        return keys

    def all_rows(self) -> Rows:
        """Every row in use."""
        return np.flatnonzero(self.namespace >= 0)

    def state_in(self, tier: Tier) -> npt.NDArray[np.uint8]:
        """The column of DramState or SsdState; LIVE is the same number in both."""
        return self.dram_state if tier == Tier.DRAM else self.ssd_state

    def children_in(self, tier: Tier) -> npt.NDArray[np.int32]:
        """For each row, how many of its children have a slot in the tier."""
        return self.dram_children if tier == Tier.DRAM else self.ssd_children

    def check(self) -> None:
        """AssertionError if index, links or counts of children contradict the rows."""
        rows = self.all_rows()
        assert len(rows) == len(self.index), f"{len(rows)} rows, {len(self.index)} keys"
        assert np.array_equal(self.lookup(self.key_list(rows)), rows), "keys lead to other rows"
        assert (self.scratch == -1).all(), "the scratch column is in use"
        parents = self.parent[rows]
        linked = rows[parents >= 0]
        up = self.parent[linked]
        assert (self.namespace[up] >= 0).all(), "a parent was removed before its child"
        in_dram = self.dram_state[linked] != DramState.NONE
        in_ssd = np.isin(self.ssd_state[linked], (SsdState.WRITING, SsdState.LIVE))
        for counts, children in (
            (self.children, up),
            (self.dram_children, up[in_dram]),
            (self.ssd_children, up[in_ssd]),
        ):
            counted = np.bincount(children, minlength=self.capacity)
            assert np.array_equal(counted, counts), "a count of children is off"
        used = (self.dram_state[rows] != DramState.NONE) | (self.ssd_state[rows] != SsdState.NONE)
        idle = ~used & (self.children[rows] == 0) & (self.pins[rows] == 0)
        assert not idle.any(), f"{int(idle.sum())} rows that nothing needs"

    def _remove(self, rows: Rows) -> None:
        if not len(rows):
            return
        self.index.remove(rows)
        for name, (_, empty) in _COLUMNS.items():
            getattr(self, name)[rows] = empty
        self._free[self._free_count : self._free_count + len(rows)] = rows[::-1]
        self._free_count += len(rows)

    def _grow(self, capacity: int) -> None:
        """Nothing is copied: the columns are there, and get the values of an empty row."""
        old, self.capacity = self.capacity, capacity
        for name, (_, empty) in _COLUMNS.items():
            if empty:
                self._columns[name][old:capacity] = empty
            setattr(self, name, self._columns[name][:capacity])
        self._scratch[old:capacity] = -1
        self.scratch = self._scratch[:capacity]
