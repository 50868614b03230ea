"""Space of one tier: segments that belong to a size class, slots within them, exact accounting.

A size class is one slot size. It takes *spans* of neighbouring segments and cuts them into slots;
a span without a used slot goes back when another class needs it. Slots given out together lie
one behind the other wherever possible, so that an answer about them is one run.
"""

import numpy as np
import numpy.typing as npt

from kvstore.core.spec import SLOT_ALIGN_BYTES
from kvstore.errors import InvalidArgumentError

Offsets = npt.NDArray[np.int64]

SEGMENTS_MIN = 64
_SORT_WINDOW = 8
_EMPTY: Offsets = np.empty(0, dtype=np.int64)


class _SizeClass:
    """Free slots of one size, as a stack of offsets, and how many slots each span has in use."""

    def __init__(self, slot_bytes: int, span_segments: int, segment_bytes: int, spans: int) -> None:
        self.slot_bytes = slot_bytes
        self.span_segments = span_segments
        self.span_bytes = span_segments * segment_bytes
        self.slots_per_span = self.span_bytes // slot_bytes
        self.used = np.zeros(spans, dtype=np.int64)
        self.owned = np.zeros(spans, dtype=np.bool_)
        self._free: Offsets = np.empty(64, dtype=np.int64)
        self.free_count = 0

    @property
    def free(self) -> Offsets:
        return self._free[: self.free_count]

    def push(self, offsets: Offsets) -> None:
        """The lowest offset will be given out first."""
        need = self.free_count + len(offsets)
        if need > len(self._free):
            self._free = np.resize(self._free, max(need, 2 * len(self._free)))
        self._free[self.free_count : need] = np.sort(offsets)[::-1]
        self.free_count = need

    def pop(self, count: int) -> Offsets:
        window = self.free[-max(_SORT_WINDOW * count, 1) :]
        if count > 1:
            window[:] = np.sort(window)[::-1]
        self.free_count -= count
        return self._free[self.free_count : self.free_count + count][::-1].copy()

    def keep(self, mask: npt.NDArray[np.bool_]) -> None:
        kept = self.free[mask]
        self.free_count = len(kept)
        self._free[: self.free_count] = kept

    def number_of(self, offsets: Offsets) -> Offsets:
        """Slots counted through all spans of the tier."""
        spans, within = np.divmod(offsets, self.span_bytes)
        numbers: Offsets = spans * self.slots_per_span + within // self.slot_bytes
        return numbers

    def slots_of(self, spans: Offsets) -> Offsets:
        within = np.arange(self.slots_per_span, dtype=np.int64) * self.slot_bytes
        return (spans[:, None] * self.span_bytes + within).ravel()


class SlotSpace:
    """The slots of one tier. Bytes are counted where they are: live, pending, quarantined, free.

    A slot is pending from ``allocate`` on; the owner moves it between the counts, and names the
    count that it is in when it gives it back.
    """

    def __init__(self, capacity_bytes: int, segment_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        target = min(segment_bytes, max(SLOT_ALIGN_BYTES, capacity_bytes // SEGMENTS_MIN))
        self.segment_bytes = max(1, target // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES
        self.segments = capacity_bytes // self.segment_bytes
        self.live_bytes = 0
        self.pending_bytes = 0
        self.quarantined_bytes = 0
        self._owner = np.full(self.segments, -1, dtype=np.int64)  # slot_bytes of the class
        self._classes: dict[int, _SizeClass] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes in no slot that is in use; includes what rounding leaves unused."""
        return self.capacity_bytes - self.live_bytes - self.pending_bytes - self.quarantined_bytes

    @property
    def slots_used_bytes(self) -> int:
        """Bytes of slots in use, as the size classes count them, not the accounts."""
        return sum(cls.slot_bytes * int(cls.used.sum()) for cls in self._classes.values())

    def slots_max(self, slot_bytes: int) -> int:
        """How many slots of this size an empty tier holds."""
        span = self._span_segments(slot_bytes)
        return (self.segments // span) * (span * self.segment_bytes // slot_bytes) if span else 0

    @property
    def spare_bytes(self) -> int:
        """Bytes of free slots, whatever their size, and of segments that nobody owns."""
        slots = sum(cls.slot_bytes * cls.free_count for cls in self._classes.values())
        return slots + int((self._owner < 0).sum()) * self.segment_bytes

    def room(self, slot_bytes: int) -> int:
        """How many slots of this size can be had without taking any from others."""
        cls = self._class(slot_bytes)
        usable = len(cls.owned) * cls.span_segments
        unowned = self._owner[:usable].reshape(-1, cls.span_segments) < 0
        return cls.free_count + int(unowned.all(axis=1).sum()) * cls.slots_per_span

    def allocate(self, slot_bytes: int, count: int) -> tuple[Offsets, list[tuple[int, int]]]:
        """Up to ``count`` slots, ascending where possible, now pending.

        Also the ranges (offset, bytes) that changed their size class for it.
        """
        cls = self._class(slot_bytes)
        taken: list[tuple[int, int]] = []
        while cls.free_count < count:
            span = self._take_span(cls, -(-(count - cls.free_count) // cls.slots_per_span))
            if not span:
                break
            taken += span
        count = min(count, cls.free_count)
        if not count:
            return _EMPTY, taken
        offsets = cls.pop(count)
        np.add.at(cls.used, offsets // cls.span_bytes, 1)
        self.pending_bytes += count * slot_bytes
        return offsets, taken

    def free(self, slot_bytes: int, offsets: Offsets, count_name: str) -> None:
        """Gives slots back from one of the counts: "live", "pending" or "quarantined"."""
        cls = self._classes[slot_bytes]
        self._add(count_name, -slot_bytes * len(offsets))
        np.subtract.at(cls.used, offsets // cls.span_bytes, 1)
        cls.push(offsets)

    def move(self, nbytes: int, source: str, target: str) -> None:
        """Moves bytes of slots in use from one count to another."""
        self._add(source, -nbytes)
        self._add(target, nbytes)

    def claim(self, slot_bytes: int, offsets: Offsets) -> npt.NDArray[np.bool_]:
        """Takes slots at given places, as found at a restart; now live. False: unusable place.

        Distinct calls must name distinct offsets; of equal offsets in one call the first counts.
        """
        usable = np.zeros(len(offsets), dtype=np.bool_)
        span = self._span_segments(slot_bytes) if slot_bytes % SLOT_ALIGN_BYTES == 0 else 0
        if not span:
            return usable
        cls = self._class(slot_bytes)
        spans, within = offsets // cls.span_bytes, offsets % cls.span_bytes
        usable[:] = (offsets >= 0) & (spans < len(cls.owned)) & (within % slot_bytes == 0)
        usable &= within // slot_bytes < cls.slots_per_span
        for number in np.unique(spans[usable]).tolist():
            if not cls.owned[number] and not self._own(cls, number):
                usable &= spans != number
        # By number of the slot: whether it is free, and which offset names it first.
        numbers = cls.number_of(np.where(usable, offsets, 0))
        free = np.zeros(len(cls.owned) * cls.slots_per_span, dtype=np.bool_)
        free[cls.number_of(cls.free)] = True
        usable &= free[numbers]
        first = np.full(len(free), len(offsets), dtype=np.int64)
        named = np.flatnonzero(usable)[::-1]
        first[numbers[named]] = named
        usable &= first[numbers] == np.arange(len(offsets))
        free[numbers[usable]] = False
        cls.keep(free[cls.number_of(cls.free)])
        np.add.at(cls.used, spans[usable], 1)
        self.live_bytes += slot_bytes * int(usable.sum())
        return usable

    def check(self, used: dict[int, Offsets]) -> None:
        """AssertionError unless exactly these slots, by size, are in use and nothing overlaps."""
        total = 0
        for slot_bytes, cls in self._classes.items():
            offsets = used.get(slot_bytes, _EMPTY)
            everything = np.concatenate((offsets, cls.free))
            expected = cls.slots_of(np.flatnonzero(cls.owned))
            assert np.array_equal(np.sort(everything), np.sort(expected)), (
                f"slots of {slot_bytes} bytes: {len(offsets)} used and {cls.free_count} free are "
                f"not the {len(expected)} of its spans"
            )
            counts = np.bincount(offsets // cls.span_bytes, minlength=len(cls.used))
            assert np.array_equal(counts, cls.used), f"span counts of {slot_bytes} bytes are off"
            owned = np.repeat(cls.owned, cls.span_segments)
            assert (self._owner[: len(owned)][owned] == slot_bytes).all(), "a segment is shared"
            total += len(offsets) * slot_bytes
        assert set(used) <= set(self._classes), "slots of an unknown size are in use"
        counted = self.live_bytes + self.pending_bytes + self.quarantined_bytes
        assert total == counted, f"{total} bytes are in slots in use, {counted} are counted"
        assert 0 <= total <= self.capacity_bytes, f"{total} bytes in use exceed the capacity"

    def _add(self, name: str, nbytes: int) -> None:
        if name == "live":
            self.live_bytes += nbytes
        elif name == "pending":
            self.pending_bytes += nbytes
        else:
            self.quarantined_bytes += nbytes

    def _span_segments(self, slot_bytes: int) -> int:
        """Segments a span: the fewest that hold nearly as many slots as the best choice; or 0."""
        fewest = -(-slot_bytes // self.segment_bytes)
        if slot_bytes <= 0 or fewest > self.segments:
            return 0
        totals = {}
        for span in range(fewest, min(self.segments, 4 * fewest + 8) + 1):
            totals[span] = (self.segments // span) * (span * self.segment_bytes // slot_bytes)
        best = max(totals.values())
        return next(span for span, total in totals.items() if 16 * total >= 15 * best)

    def _class(self, slot_bytes: int) -> _SizeClass:
        cls = self._classes.get(slot_bytes)
        if cls is None:
            span = self._span_segments(slot_bytes)
            if not span:
                raise InvalidArgumentError(
                    f"a slot of {slot_bytes} bytes does not fit into a tier of "
                    f"{self.capacity_bytes} bytes"
                )
            cls = _SizeClass(slot_bytes, span, self.segment_bytes, self.segments // span)
            self._classes[slot_bytes] = cls
        return cls

    def _take_span(self, cls: _SizeClass, wanted: int) -> list[tuple[int, int]]:
        """Unowned spans, at most ``wanted``; else one of those that other classes left empty."""
        usable = len(cls.owned) * cls.span_segments
        unowned = self._owner[:usable].reshape(-1, cls.span_segments) < 0
        free = np.flatnonzero(unowned.all(axis=1))[:wanted]
        if not len(free) and self._give_back_empty(cls):
            return self._take_span(cls, wanted)
        for number in reversed(free.tolist()):
            self._own(cls, number)
        return [(number * cls.span_bytes, cls.span_bytes) for number in free.tolist()]

    def _own(self, cls: _SizeClass, number: int) -> bool:
        first = number * cls.span_segments
        segments = self._owner[first : first + cls.span_segments]
        if (segments >= 0).any():
            return False
        segments[:] = cls.slot_bytes
        cls.owned[number] = True
        cls.push(cls.slots_of(np.array([number], dtype=np.int64)))
        return True

    def _give_back_empty(self, wanting: _SizeClass) -> bool:
        """Takes all empty spans from the other classes."""
        changed = False
        for cls in self._classes.values():
            empty = cls.owned & (cls.used == 0)
            if cls is wanting or not empty.any():
                continue
            cls.keep(~empty[cls.free // cls.span_bytes])
            cls.owned[empty] = False
            segments = np.repeat(empty, cls.span_segments)
            self._owner[: len(segments)][segments] = -1
            changed = True
        return changed
