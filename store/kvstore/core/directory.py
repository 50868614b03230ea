"""The directory in shared memory: key to tier without a call, and the generations of slots.

One file: a header of 4 KiB, an open-addressing table, one u32 generation a page of the pool.
One process writes; any number read at the same time. An entry is five u64 words: version
(odd while it is written) in the low and tier in the high half of the first, then the key.
What a reader finds is a hint: only an Acquire makes it true.
"""

import struct

import numpy as np
import numpy.typing as npt

from kvstore.core.distinct import distinct
from kvstore.core.keys import KEY_BYTES
from kvstore.core.packing import packed
from kvstore.core.spec import SLOT_ALIGN_BYTES
from kvstore.errors import CorruptError, InvalidArgumentError, PreconditionError

MAGIC = b"kvstoreD"
LAYOUT_VERSION = 1
HEADER_BYTES = 4096
ENTRY_WORDS = 5
ENTRIES_MIN = 1 << 10
ENTRIES_MAX = 1 << 22
PROBES_MAX = 128
WINDOW = 4096  # places that are tidied in one go
_KEYS_A_WINDOW = 64  # keys that enter for each window that is tidied
_HEADER = struct.Struct("<8sIIQQQQQ")
_CLOSED_AT = _HEADER.size
TOMBSTONE = 0xFF  # in place of a tier
_TIER_SHIFT = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)
_TOMBSTONE_HEAD = np.uint64(TOMBSTONE << 32)

Words = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]


def entries_for(bytes_stored: int, block_bytes: int = 16 << 10) -> int:
    """Table size for that many bytes in blocks of that size, a power of two.

    At most a quarter full: a vectorised look-up takes as many rounds as its longest probe; 8 on
    average at a quarter, 21 at a half with its tombstones.
    """
    blocks = max(1, bytes_stored // block_bytes)
    return min(ENTRIES_MAX, max(ENTRIES_MIN, 1 << (4 * blocks - 1).bit_length()))


def _key_words(keys: bytes) -> Words:
    if len(keys) % KEY_BYTES:
        raise InvalidArgumentError(
            f"a key list has {len(keys)} bytes; it must be a multiple of {KEY_BYTES}"
        )
    return np.frombuffer(keys, dtype="<u8").reshape(-1, 4)


def _joined(keys: bytes | list[bytes]) -> bytes:
    return keys if isinstance(keys, bytes) else b"".join(keys)


def _first_place(words: Words, mask: int) -> Rows:
    return (words[:, 0] & np.uint64(mask)).astype(np.int64)


def _same_key(rows: Words, keys: Words) -> npt.NDArray[np.bool_]:
    same: npt.NDArray[np.bool_] = rows[:, 1] == keys[:, 0]
    for word in range(1, 4):
        same &= rows[:, word + 1] == keys[:, word]
    return same


class DirectoryWriter:
    """The node's side. ``buffer`` is writable and has ``size_bytes(...)`` zero bytes."""

    def __init__(
        self, buffer: memoryview | bytearray, *, entries: int, pool_bytes: int, instance: int
    ) -> None:
        if entries < 2 or entries & (entries - 1):
            raise InvalidArgumentError(f"{entries} directory entries; take a power of two")
        table_bytes = entries * ENTRY_WORDS * 8
        pages = -(-pool_bytes // SLOT_ALIGN_BYTES)
        _HEADER.pack_into(
            buffer,
            0,
            MAGIC,
            LAYOUT_VERSION,
            HEADER_BYTES,
            instance,
            entries,
            HEADER_BYTES + table_bytes,
            pages,
            pool_bytes,
        )
        self._closed = np.frombuffer(buffer, dtype="<u4", count=1, offset=_CLOSED_AT)
        self._table: Words = np.frombuffer(
            buffer, dtype="<u8", count=entries * ENTRY_WORDS, offset=HEADER_BYTES
        ).reshape(entries, ENTRY_WORDS)
        self.generations: npt.NDArray[np.uint32] = np.frombuffer(
            buffer, dtype="<u4", count=pages, offset=HEADER_BYTES + table_bytes
        )
        self._mask = entries - 1
        self._limit = entries * 3 // 4
        self._window = min(WINDOW, entries // 2)
        self._tidied_to = 0  # the place that the next window begins at
        self._tidy_from = max(1, entries // 32)  # tombstones
        self.live = 0  # keys in the table
        self.tombstones = 0
        self.unpublished = 0  # keys that found no place: calls still find them

    @staticmethod
    def size_bytes(entries: int, pool_bytes: int) -> int:
        """Bytes of the file."""
        return HEADER_BYTES + entries * ENTRY_WORDS * 8 + 4 * -(-pool_bytes // SLOT_ALIGN_BYTES)

    def publish(self, keys: bytes | list[bytes], tier: int) -> None:
        """Enters distinct keys, or changes their tier."""
        words = _key_words(_joined(keys))
        self._tidy(len(words))
        found, place = self._find(words)
        self._write_tier(place[found], tier)
        if found.all():
            return
        words, place = words[~found], place[~found]
        room = max(0, self._limit - self.live)
        self.unpublished += max(0, len(words) - room)
        self._insert(words[:room], place[:room], tier)

    def unpublish(self, keys: bytes | list[bytes]) -> None:
        """Takes keys out; unknown ones are ignored."""
        found, place = self._find(_key_words(_joined(keys)))
        place = place[found]
        if not len(place):
            return
        self._write_tier(place, TOMBSTONE)
        self.live -= len(place)
        self.tombstones += len(place)
        self._sweep(place)

    def bump_generations(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """Marks slots as given out anew; returns their generations. Offsets are distinct."""
        pages = offsets // SLOT_ALIGN_BYTES
        self.generations[pages] += np.uint32(1)
        return self.generations[pages]

    def generations_at(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """Generations of the slots at these offsets."""
        return self.generations[offsets // SLOT_ALIGN_BYTES]

    def bump_range(self, offset: int, nbytes: int) -> None:
        """Marks every page of a range, which from now on has slots of another size."""
        first = offset // SLOT_ALIGN_BYTES
        self.generations[first : first + nbytes // SLOT_ALIGN_BYTES] += np.uint32(1)

    def close_directory(self) -> None:
        """Tells readers that this node instance has ended."""
        self._closed[0] = 1

    def _find(self, words: Words) -> tuple[npt.NDArray[np.bool_], Rows]:
        """For each key: whether it is in, and its place, or else the first place to put it."""
        count = len(words)
        found = np.zeros(count, dtype=np.bool_)
        place = np.full(count, -1, dtype=np.int64)
        todo = np.arange(count)
        at = _first_place(words, self._mask)
        for _ in range(PROBES_MAX):
            rows = self._table[at]
            tiers = rows[:, 0] >> _TIER_SHIFT
            hit = _same_key(rows, words[todo]) & (tiers != 0) & (tiers != TOMBSTONE)
            usable = (place[todo] < 0) & ((tiers == 0) | (tiers == TOMBSTONE))
            place[todo[usable]] = at[usable]
            place[todo[hit]] = at[hit]
            found[todo[hit]] = True
            more = ~hit & (tiers != 0)
            if not more.any():
                break
            todo, at = todo[more], (at[more] + 1) & self._mask
        return found, place

    def _insert(self, words: Words, place: Rows, tier: int) -> None:
        """Writes absent keys; those that want the same place go round again."""
        while len(words):
            placed = place >= 0
            self.unpublished += int((~placed).sum())
            words, place = words[placed], place[placed]
            slots, winners = np.unique(place, return_index=True)
            self._write_entries(slots, words[winners], tier)
            rest = np.ones(len(words), dtype=np.bool_)
            rest[winners] = False
            words = words[rest]
            if len(words):
                place = self._find(words)[1]

    def _write_entries(self, slots: Rows, words: Words, tier: int) -> None:
        self.tombstones -= int((self._table[slots, 0] >> _TIER_SHIFT == TOMBSTONE).sum())
        self.live += len(slots)
        self._write_keys(slots, words, np.uint64(tier << 32))

    def _write_keys(self, slots: Rows, words: Words, tiers: Words | np.uint64) -> None:
        """Writes whole entries, tombstones meanwhile: readers go past them."""
        odd = (self._table[slots, 0] & _LOW) | np.uint64(1)
        self._table[slots, 0] = odd | _TOMBSTONE_HEAD
        self._table[slots, 1:] = words
        self._table[slots, 0] = ((odd + np.uint64(1)) & _LOW) | tiers

    def _write_tier(self, slots: Rows, tier: int) -> None:
        versions = ((self._table[slots, 0] & _LOW) + np.uint64(2)) & _LOW
        self._table[slots, 0] = versions | np.uint64(tier << 32)

    def _sweep(self, slots: Rows) -> None:
        """Tombstones before an empty place are empty themselves."""
        while len(slots):
            following = self._table[(slots + 1) & self._mask, 0] >> _TIER_SHIFT
            tombs = self._table[slots, 0] >> _TIER_SHIFT == TOMBSTONE
            clear = distinct(slots[(following == 0) & tombs])
            self._write_tier(clear, 0)
            self.tombstones -= len(clear)
            slots = (clear - 1) & self._mask

    def _tidy(self, count: int) -> None:
        """Wins tombstones back before ``count`` keys enter.

        A window costs the same whatever it wins, so nothing happens below a 32nd of tombstones;
        from there on it wins back twice what the keys that it is tidied for can have left.
        """
        for _ in range(1 + count // _KEYS_A_WINDOW):
            if self.tombstones < self._tidy_from:
                return
            self._tidy_window()

    def _tidy_window(self) -> None:
        """Moves the keys of the next window as near to their first places as they can come.

        Then its free places are empty, but for those that a key behind the window has passed: it
        is no further than ``PROBES_MAX`` from its first place, which bounds what is looked at.
        Readers may miss a key while it moves, and no other.
        """
        size = self._window
        at = (self._tidied_to + np.arange(min(size + PROBES_MAX, self._mask + 1))) & self._mask
        heads = self._table[at, 0]
        tiers = heads >> _TIER_SHIFT
        live = np.flatnonzero((tiers != 0) & (tiers != TOMBSTONE))
        wanted = _first_place(self._table[at[live], 1:2], self._mask)
        first = live - ((at[live] - wanted) & self._mask)  # as places count from the window's
        inside = int(np.searchsorted(live, size))
        passed = int(first[inside:].min(initial=size))
        order, target = packed(first[:inside])
        places = np.arange(size)
        source = places.copy()
        source[target] = live[order]
        after = np.where(places < passed, np.uint64(0), _TOMBSTONE_HEAD)
        after[target] = heads[live[order]] & ~_LOW
        changed = np.flatnonzero((source != places) | (after >> _TIER_SHIFT != tiers[:size]))
        words = self._table[at[source[changed]], 1:]
        self._write_keys(at[changed], words, after[changed])
        self.tombstones += int((after == _TOMBSTONE_HEAD).sum())
        self.tombstones -= int((tiers[:size] == TOMBSTONE).sum())
        self._tidied_to = int(at[size - min(PROBES_MAX, size // 2)])


class DirectoryReader:
    """A client's side. ``buffer`` is the mapped file; nothing is written to it."""

    def __init__(self, buffer: memoryview | bytes | bytearray) -> None:
        if len(buffer) < HEADER_BYTES:
            raise CorruptError(f"a directory of {len(buffer)} bytes has no header")
        magic, layout, header, instance, entries, generations_at, pages, pool_bytes = (
            _HEADER.unpack_from(buffer)
        )
        if magic != MAGIC:
            raise CorruptError("the mapped file is no kvstore directory")
        if layout != LAYOUT_VERSION:
            raise PreconditionError(
                f"the node's directory has layout {layout}, this client reads {LAYOUT_VERSION}: "
                "use the same kvstore version on both sides"
            )
        table_bytes = entries * ENTRY_WORDS * 8
        if (
            header != HEADER_BYTES
            or entries < 2
            or entries & (entries - 1)
            or generations_at != HEADER_BYTES + table_bytes
            or len(buffer) < generations_at + 4 * pages
        ):
            raise CorruptError("the directory's header contradicts its size")
        self.instance: int = instance
        self.pool_bytes: int = pool_bytes
        self._mask = entries - 1
        self._closed = np.frombuffer(buffer, dtype="<u4", count=1, offset=_CLOSED_AT)
        self._table: Words = np.frombuffer(
            buffer, dtype="<u8", count=entries * ENTRY_WORDS, offset=HEADER_BYTES
        ).reshape(entries, ENTRY_WORDS)
        self._generations: npt.NDArray[np.uint32] = np.frombuffer(
            buffer, dtype="<u4", count=pages, offset=generations_at
        )

    @property
    def closed(self) -> bool:
        """Whether the node has ended in good order; a killed one never says so."""
        return bool(self._closed[0])

    def match(self, keys_joined: bytes) -> npt.NDArray[np.uint8]:
        """Tiers of the leading keys that are present, up to the first one that is not."""
        words = _key_words(keys_joined)
        tiers = np.zeros(len(words), dtype=np.uint8)
        todo = np.arange(len(words))
        at = _first_place(words, self._mask)
        wanted = words
        for _ in range(PROBES_MAX):
            rows = self._table[at]
            head = rows[:, 0]
            tier = head >> _TIER_SHIFT
            # A torn entry has an odd version, or another one now than when its row was copied.
            steady = (self._table[at, 0] == head) & (head & np.uint64(1) == 0)
            hit = _same_key(rows, wanted) & steady & (tier != 0) & (tier != TOMBSTONE)
            if hit.all():
                tiers[todo] = tier
                break
            tiers[todo[hit]] = tier[hit]
            missed = todo[~hit & (tier == 0)]
            end = int(missed[0]) if len(missed) else len(words)
            more = ~hit & (todo < end)
            if not more.any():
                break
            todo, wanted = todo[more], wanted[more]
            at = (at[more] + 1) & self._mask
        absent = np.flatnonzero(tiers == 0)
        return tiers[: absent[0]] if len(absent) else tiers

    def generations_at(self, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint32]:
        """Generations, now, of the slots at these offsets into the pool."""
        return self._generations[offsets // SLOT_ALIGN_BYTES]
