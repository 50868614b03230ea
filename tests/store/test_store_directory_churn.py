"""A full directory whose keys come and go: what a change costs, and what readers see meanwhile."""

import random
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from kvstore.core import directory
from kvstore.core.directory import (
    PROBES_MAX,
    WINDOW,
    DirectoryReader,
    DirectoryWriter,
)

LARGE = 1 << 16
TOMBSTONE = 0xFF


class Watched:
    """A table that counts the places read and written, and calls before reads, after writes.

    ``single``: writes go place by place.
    """

    def __init__(self, table: directory.Words, *, single: bool = False) -> None:
        self.table, self.single = table, single
        self.places = 0
        self.before_read: Callable[[], None] = lambda: None
        self.after_write: Callable[[], None] = lambda: None

    def __getitem__(self, at: Any) -> Any:
        self.before_read()
        value = self.table[at]
        self.places += len(value)
        return value

    def __setitem__(self, at: Any, value: Any) -> None:
        rows, columns = at if isinstance(at, tuple) else (at, slice(None))
        self.places += len(self.table[rows, 0])
        if not self.single:
            self.table[at] = value
            return
        values = np.broadcast_to(value, self.table[at].shape)
        for row, one in zip(np.arange(len(self.table))[rows], values, strict=True):
            self.table[row, columns] = one
            self.after_write()


def make(entries: int) -> tuple[DirectoryWriter, DirectoryReader]:
    buffer = bytearray(DirectoryWriter.size_bytes(entries, 4096))
    writer = DirectoryWriter(buffer, entries=entries, pool_bytes=4096, instance=1)
    return writer, DirectoryReader(buffer)


def watch(side: DirectoryWriter | DirectoryReader, *, single: bool = False) -> Watched:
    watched = Watched(side._table, single=single)
    side._table = cast(directory.Words, watched)
    return watched


def churn(
    writer: DirectoryWriter, count: int, *, quarters: int = 3
) -> Iterator[Callable[[], None]]:
    """Changes of a table so full, ``count`` keys each, till every place was tidied."""
    rng = random.Random(1)
    held = [rng.randbytes(32) for _ in range((writer._mask + 1) * quarters // 4)]
    writer.publish(held, 2)
    for _ in range(LARGE // (3 * count)):
        some = rng.sample(range(len(held)), count)
        old, new = [held[i] for i in some], [rng.randbytes(32) for _ in some]
        yield lambda old=old: writer.unpublish(old)  # type: ignore[misc]
        yield lambda new=new: writer.publish(new, 2)  # type: ignore[misc]
        for i, key in zip(some, new, strict=True):
            held[i] = key


@pytest.mark.parametrize("quarters", [2, 3])
def test_I7_no_change_looks_at_the_whole_table_nor_leaves_many_tombstones(quarters: int) -> None:
    writer, _ = make(LARGE)
    changes, watched = churn(writer, 32, quarters=quarters), watch(writer)
    most = tombstones = 0
    for change in changes:
        watched.places = 0
        change()
        most = max(most, watched.places)
        tombstones = max(tombstones, writer.tombstones)
    assert most <= 8 * WINDOW < LARGE
    assert LARGE // 32 < tombstones <= LARGE // 16
    assert writer.live + writer.unpublished >= LARGE * quarters // 4


def test_I7_no_change_of_a_full_table_needs_memory_for_all_of_it() -> None:
    writer, _ = make(LARGE)
    most = 0
    for change in churn(writer, 256):
        tracemalloc.start()
        try:
            change()
            most = max(most, tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert most <= 256 * WINDOW < LARGE * directory.ENTRY_WORDS * 8


def test_I7_many_keys_that_go_at_once_are_tidied_up_as_others_come() -> None:
    writer, reader = make(LARGE)
    rng = random.Random(2)
    keys = [rng.randbytes(32) for _ in range(LARGE * 3 // 4)]
    writer.publish(keys, 2)
    kept = rng.sample(keys, LARGE // 4)
    writer.unpublish(sorted(set(keys) - set(kept)))
    assert writer.tombstones > LARGE // 8
    for _ in range(LARGE // 64):
        writer.publish([rng.randbytes(32) for _ in range(32)], 2)
    assert writer.tombstones <= LARGE // 32
    assert len(reader.match(b"".join(kept))) == len(kept)


def some_key(rng: random.Random, entries: int) -> bytes:
    """Half of them where they like; the others crowd at the end of the table."""
    first = rng.getrandbits(63) if rng.random() < 0.5 else max(0, entries - 1 - rng.randrange(24))
    return first.to_bytes(8, "little") + rng.randbytes(24)


def check_table(writer: DirectoryWriter, model: dict[bytes, int]) -> None:
    """Every key once, within reach, with nothing empty before it; counts that are true."""
    table, mask = writer._table, writer._mask
    tiers = table[:, 0] >> np.uint64(32)
    assert not (table[:, 0] & np.uint64(1)).any()
    live = np.flatnonzero((tiers != 0) & (tiers != TOMBSTONE))
    assert {table[at, 1:].tobytes(): int(tiers[at]) for at in live} == model
    assert len(live) == len(model) == writer.live
    assert int((tiers == TOMBSTONE).sum()) == writer.tombstones
    for at in live.tolist():
        first = int(table[at, 1]) & mask
        distance = (at - first) & mask
        assert distance < PROBES_MAX
        assert tiers[(first + np.arange(distance)) & mask].all()


@pytest.mark.parametrize("entries", [2, 8, 128, 256])
@pytest.mark.parametrize("seed", range(2))
def test_any_history_of_a_full_table_equals_a_dict(entries: int, seed: int) -> None:
    rng = random.Random(seed)
    writer, reader = make(entries)
    model: dict[bytes, int] = {}
    room = entries * 3 // 4
    for step in range(120):
        action = rng.random()
        if action < 0.5 and len(model) < room:
            count = rng.randint(1, min(room - len(model), 1 + entries // 16))
            keys, tier = [some_key(rng, entries) for _ in range(count)], rng.randint(1, 3)
            before = writer.unpublished
            writer.publish(keys, tier)
            entered = [key for key in keys if len(reader.match(key))]
            assert writer.unpublished - before == count - len(entered)
            model.update(dict.fromkeys(entered, tier))
        elif action < 0.9 and model:
            keys = rng.sample(sorted(model), rng.randint(1, min(len(model), 1 + entries // 16)))
            if action < 0.6:
                writer.publish(keys, 3)
                model.update(dict.fromkeys(keys, 3))
            else:
                writer.unpublish(keys)
                for key in keys:
                    del model[key]
        else:
            writer._tidy_window()
            check_table(writer, model)
        if step % 16 == 0:
            check_table(writer, model)
    for key, tier in model.items():
        assert reader.match(key).tolist() == [tier]


def test_readers_miss_a_key_only_while_it_moves() -> None:
    entries = 64
    writer, reader = make(entries)
    rng = random.Random(3)
    model = {some_key(rng, entries): 2 for _ in range(46)}
    writer.publish(list(model), 2)
    gone = rng.sample(sorted(model), 12)
    writer.unpublish(gone)
    for key in gone:
        del model[key]
    watched = watch(writer, single=True)
    missed: set[bytes] = set()

    def look() -> None:
        assert not any(len(reader.match(key)) for key in gone)
        for key in model:
            tiers = reader.match(key).tolist()
            assert tiers in ([], [2])
            if not tiers:
                missed.add(key)

    def places() -> dict[bytes, int]:
        return {reader._table[at, 1:].tobytes(): at for at in range(entries) if live(at)}

    def live(at: int) -> bool:
        return int(reader._table[at, 0]) >> 32 == 2

    moved = 0
    watched.after_write = look
    for _ in range(4):
        before = places()
        writer._tidy_window()
        after = places()
        moves = {key for key in model if before[key] != after[key]}
        assert missed <= moves
        moved += len(moves)
        missed.clear()
    watched.after_write = lambda: None
    assert moved > 10
    new = [some_key(rng, entries) for _ in range(10)]
    watched.after_write = look
    writer.publish(new, 2)
    assert not missed


@pytest.mark.parametrize("seed", range(2))
def test_I1_a_reader_amid_changes_sees_no_tier_that_a_key_has_not(seed: int) -> None:
    entries = 256
    writer, reader = make(entries)
    rng = random.Random(seed)
    known = [some_key(rng, entries) for _ in range(220)]
    model = dict.fromkeys(known[:180], 2)
    writer.publish(list(model), 2)
    seen: dict[bytes, set[int]] = {}

    def change() -> None:
        action = rng.random() * 8
        if action < 0.4 and len(model) > 170:
            keys = rng.sample(list(model), 2)
            writer.unpublish(keys)
            for key in keys:
                del model[key]
        elif action < 0.8 and len(model) < 180:
            keys, tier = rng.sample(known, 2), rng.randint(2, 3)
            writer.publish(keys, tier)
            model.update(dict.fromkeys(keys, tier))
            for key in keys:
                seen.setdefault(key, set()).add(tier)
        elif action < 1.2:
            writer._tidy_window()

    watched, hits = watch(reader), 0
    watched.before_read = change
    for _ in range(100):
        asked = rng.sample(known, 4)
        seen = {key: {tier} for key, tier in model.items()}
        tiers = reader.match(b"".join(asked)).tolist()
        hits += len(tiers)
        for key, tier in zip(asked, tiers, strict=False):
            assert tier in seen.get(key, ())
    assert hits > 60
