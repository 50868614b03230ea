"""The index from key to row against a dict, also with keys that somebody chose to collide."""

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvstore.core.column import column
from kvstore.core.key_index import PROBES_MAX, WINDOW, KeyIndex
from kvstore.core.table import Table

ROWS = 256


def near_keys(count: int) -> list[bytes]:
    """Keys that all want the same place."""
    return [bytes(8) + i.to_bytes(24, "little") for i in range(1, count + 1)]


NEAR = near_keys(200)
EVERY = [random.Random(i).randbytes(32) if i % 2 else NEAR[i] for i in range(200)]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 199), min_size=1, max_size=40, unique=True), max_size=20))
def test_it_agrees_with_a_dict(calls: list[list[int]]) -> None:
    keys: np.ndarray[tuple[int, int], np.dtype[np.uint8]] = column((ROWS, 32), np.uint8)
    index, model = KeyIndex(keys.view("<u8")), dict[bytes, int]()
    for numbers in calls:
        names = [EVERY[number] for number in numbers]
        known = [name for name in names if name in model]
        if known:
            index.remove(np.array([model.pop(name) for name in known]))
        else:
            free = sorted(set(range(ROWS)) - set(model.values()))[: len(names)]
            for name, row in zip(names, free, strict=True):
                keys[row] = np.frombuffer(name, dtype=np.uint8)
                model[name] = row
            index.insert(b"".join(names), np.array(free))
        expected = [model.get(name, -1) for name in EVERY]
        assert index.find_all(b"".join(EVERY)).tolist() == expected
        assert [index.find(name) for name in EVERY] == expected
        assert len(index) == len(model)


def some_key(rng: random.Random, rows: int) -> bytes:
    """Half of them where they like; the others crowd at the end of the index."""
    near = max(16, 2 * rows) - 1 - rng.randrange(8)
    first = rng.getrandbits(63) if rng.random() < 0.5 else near << 20
    return first.to_bytes(8, "little") + rng.randbytes(24)


def check_places(index: KeyIndex, keys: dict[int, bytes]) -> None:
    """Every key once, within reach, with nothing empty before it, or else in the dict."""
    places, mask = index._places, index._mask
    taken = np.flatnonzero(places > 0)
    rows = (places[taken] - 1).tolist()
    assert sorted(rows + list(index._overflow.values())) == sorted(keys)
    for row, at in zip(rows, taken.tolist(), strict=True):
        first = (int.from_bytes(keys[row][:8], "little") >> 20) & mask
        distance = (at - first) & mask
        assert distance < PROBES_MAX
        assert places[(first + np.arange(distance)) & mask].all()


@pytest.mark.parametrize("rows", [2, 8, 64, 256])
@pytest.mark.parametrize("seed", range(4))
def test_any_history_of_a_full_index_equals_a_dict(rows: int, seed: int) -> None:
    rng = random.Random(seed)
    column_of_keys: np.ndarray[tuple[int, int], np.dtype[np.uint8]] = column((rows, 32), np.uint8)
    index = KeyIndex(column_of_keys.view("<u8"))
    held, gone = dict[int, bytes](), list[bytes]()
    for step in range(200):
        if held and (len(held) == rows or rng.random() < 0.4):
            some = rng.sample(sorted(held), rng.randint(1, min(len(held), 1 + rows // 8)))
            index.remove(np.array(some))
            gone = [held.pop(row) for row in some]
        else:
            free = sorted(set(range(rows)) - set(held))[: rng.randint(1, 1 + rows // 4)]
            new = {row: some_key(rng, rows) for row in free}
            for row, key in new.items():
                column_of_keys[row] = np.frombuffer(key, dtype=np.uint8)
            index.insert(b"".join(new.values()), np.array(free))
            held.update(new)
        if step % 4 == 0:
            index._tidy_window()
        check_places(index, held)
        assert index.find_all(b"".join(held.values())).tolist() == list(held)
        assert (index.find_all(b"".join(gone)) == -1).all()
        assert len(index) == len(held)


def test_I7_a_full_index_finds_out_about_absent_keys_in_few_rounds_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, rng = 4 * WINDOW, np.random.default_rng(1)

    def keys(count: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
        return rng.integers(0, 1 << 63, (count, 4), dtype=np.uint64)

    words = keys(rows)
    index = KeyIndex(words)
    index.insert(words.tobytes(), np.arange(rows))
    for _ in range(20):
        order = rng.permutation(rows)
        for i in range(0, rows, 64):
            some = order[i : i + 64]
            index.remove(some)
            words[some] = keys(64)
            index.insert(words[some].tobytes(), some)
    rounds, probe = 0, KeyIndex._probe

    def counted(*args: Any) -> Any:
        nonlocal rounds
        rounds += 1
        return probe(*args)

    monkeypatch.setattr(KeyIndex, "_probe", counted)
    assert (index.find_all(keys(512).tobytes()) == -1).all()
    assert rounds <= PROBES_MAX // 2
    assert int((index._places == -1).sum()) <= len(index._places) // 8


@pytest.mark.parametrize("count", [PROBES_MAX, PROBES_MAX + 1, 3 * PROBES_MAX])
def test_I7_keys_that_all_want_one_place_are_found_and_removed(count: int) -> None:
    table, names = Table(1024), near_keys(count)
    rows = table.add(names, 1)
    assert table.lookup(names).tolist() == rows.tolist()
    assert table.lookup(near_keys(count + 1)[-1:]).tolist() == [-1]
    table.discard_empty(rows[::2])
    assert table.lookup(names[1::2]).tolist() == rows[1::2].tolist()
    assert (table.lookup(names[::2]) == -1).all()
    table.add(names[::2], 1)
    assert (table.lookup(names) >= 0).all()
    assert len(set(table.lookup(names).tolist())) == count


def test_a_table_grows_in_steps_up_to_its_end() -> None:
    table = Table(200_000)
    names = [i.to_bytes(8, "little") * 4 for i in range(200_000)]
    rows = table.add(names[:150_000], 1)
    assert len(np.unique(rows)) == 150_000
    assert table.capacity < 200_000
    table.add(names[150_000:], 2)
    assert table.room() == 0
    assert table.capacity == 200_000
    assert (table.parent == -1).all()
    assert (table.namespace[rows] == 1).all()
