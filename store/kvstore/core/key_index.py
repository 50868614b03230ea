"""From key to row: open addressing over the keys that the table keeps, vectorised.

Four bytes a place and no object a key. There are twice as many places as there can ever be keys,
so that nothing ever grows; tombstones are won back a window of places at a time. No request waits
for the whole of it.
"""

import numpy as np
import numpy.typing as npt

from kvstore.core.column import column
from kvstore.core.distinct import distinct
from kvstore.core.packing import packed

Rows = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

NO_ROW = -1
PROBES_MAX = 64
WINDOW = 2048  # places that are tidied in one go
_EMPTY, _TOMBSTONE = 0, -1  # else the row plus one
_SHIFT = 20  # other bits of the key than those that lead into the directory
_ALL_SAME = 0x01010101  # four bytes of True
_FEW = 4  # keys that are looked up sooner one by one


class KeyIndex:
    """``words`` is the table's column of keys, four u64 each, of its final length.

    A key whose first ``PROBES_MAX`` places are taken, which only keys that somebody chose for it
    bring about, is in a dict instead.
    """

    def __init__(self, words: Words) -> None:
        places = 1 << max(4, (2 * len(words) - 1).bit_length())
        self._places: npt.NDArray[np.int32] = column(places, np.int32)
        self._mask = places - 1
        self._words = words
        self._overflow: dict[bytes, int] = {}
        self._count = 0
        self._window = min(WINDOW, places // 2)
        self._tidied_to = 0  # the place that the next window begins at
        self._few = self._window // 16  # tombstones that a window may keep
        self._left = 0  # tombstones that were left since a window was tidied

    def __len__(self) -> int:
        return self._count

    def find(self, key: bytes) -> int:
        """The row of a key; -1 if there is none."""
        at = (int.from_bytes(key[:8], "little") >> _SHIFT) & self._mask
        for _ in range(PROBES_MAX):
            entry = int(self._places[at])
            if entry == _EMPTY:
                break
            if entry > 0 and self._words[entry - 1].tobytes() == key:
                return entry - 1
            at = (at + 1) & self._mask
        return self._overflow.get(key, NO_ROW)

    def find_all(self, joined: bytes) -> Rows:
        """Rows of n x 32 bytes of keys, -1 where there is none."""
        if len(joined) <= 32 * _FEW:
            found = [self.find(joined[i : i + 32]) for i in range(0, len(joined), 32)]
            return np.array(found, dtype=np.int64)
        return self._locate(_words_of(joined))[0]

    def insert(self, joined: bytes, rows: Rows) -> None:
        """Enters absent, distinct keys, which stand in the column already."""
        self._count += len(rows)
        at = self._first(_words_of(joined))
        for _ in range(PROBES_MAX):
            free = self._places[at] <= 0
            # Of several that want one place, the last one written has it.
            self._places[at[free]] = rows[free] + 1
            left = self._places[at] != rows + 1
            if not left.any():
                return
            rows, at = rows[left], (at[left] + 1) & self._mask
        for row in rows.tolist():
            self._overflow[self._words[row].tobytes()] = row

    def remove(self, rows: Rows) -> None:
        """Takes the keys of these distinct rows out; they still stand in the column."""
        self._count -= len(rows)
        found, places = self._locate(self._words[rows])
        assert np.array_equal(found, rows), "a key leads to another row than its own"
        if self._overflow:
            for row in rows[places < 0].tolist():
                del self._overflow[self._words[row].tobytes()]
            places = places[places >= 0]
        self._places[places] = _TOMBSTONE
        self._left += len(places)
        # Tombstones before an empty place are empty themselves.
        while len(places):
            follows_empty = self._places[(places + 1) & self._mask] == _EMPTY
            cleared = distinct(places[follows_empty & (self._places[places] == _TOMBSTONE)])
            self._places[cleared] = _EMPTY
            self._left = max(0, self._left - len(cleared))
            places = (cleared - 1) & self._mask
        while self._left > self._few:
            self._left -= self._few + 1
            self._tidy_window()

    def _tidy_window(self) -> None:
        """Moves the keys of the next window as near to their first places as they can come.

        Then its free places are empty, but for those that a key behind the window has passed: it
        is no further than ``PROBES_MAX`` from its first place, which bounds what is looked at.
        Each window costs the same, so one with few tombstones stays as it is.
        """
        size = self._window
        at = (self._tidied_to + np.arange(min(size + PROBES_MAX, self._mask + 1))) & self._mask
        entries = self._places[at]
        self._tidied_to = int(at[size - min(PROBES_MAX, size // 2)])
        if np.count_nonzero(entries[:size] == _TOMBSTONE) <= self._few:
            return
        live = np.flatnonzero(entries > 0)
        wanted = self._first(self._words[entries[live] - 1])
        first = live - ((at[live] - wanted) & self._mask)  # as places count from the window's
        inside = int(np.searchsorted(live, size))
        passed = int(first[inside:].min(initial=size))
        order, target = packed(first[:inside])
        after = np.where(np.arange(size) < passed, np.int32(_EMPTY), np.int32(_TOMBSTONE))
        after[target] = entries[live[order]]
        self._places[at[:size]] = after

    def _first(self, words: Words) -> Rows:
        return ((words[:, 0] >> np.uint64(_SHIFT)) & np.uint64(self._mask)).astype(np.int64)

    def _probe(self, at: Rows, wanted: Words) -> tuple[npt.NDArray[np.int32], Rows, Mask]:
        """What stands at places, as entries and as rows, and where that is the wanted key."""
        entries = self._places.take(at)
        candidates = entries.astype(np.int64) - 1
        same = _same(self._words.take(candidates, axis=0), wanted)
        return entries, candidates, (entries > 0) & same

    def _locate(self, words: Words) -> tuple[Rows, Rows]:
        """Row and place of each key; -1 for the row where it is absent, for the place also where
        it has overflowed.
        """
        at = self._first(words)
        entries, candidates, hit = self._probe(at, words)
        if hit.all():  # nearly always, where there is no miss
            return candidates, at
        rows = np.full(len(words), NO_ROW, dtype=np.int64)
        places = rows.copy()
        todo, wanted = np.arange(len(words)), words
        for _ in range(PROBES_MAX):
            rows[todo[hit]] = candidates[hit]
            places[todo[hit]] = at[hit]
            more = ~hit & (entries != _EMPTY)
            if not more.any():
                break
            todo, wanted, at = todo[more], wanted[more], (at[more] + 1) & self._mask
            entries, candidates, hit = self._probe(at, wanted)
        if self._overflow:
            for i in np.flatnonzero(rows < 0).tolist():
                rows[i] = self._overflow.get(words[i].tobytes(), NO_ROW)
        return rows, places


def _same(keys: Words, others: Words) -> Mask:
    """For each pair of keys whether all four words agree; a sixth of the time of ``all``."""
    same: Mask = (keys == others).view(np.uint32).ravel() == _ALL_SAME
    return same


def _words_of(joined: bytes) -> Words:
    return np.frombuffer(joined, dtype="<u8").reshape(-1, 4)
