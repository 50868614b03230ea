"""The index from key to row against a dict, also with keys that somebody chose to collide."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvstore.core.column import column
from kvstore.core.key_index import PROBES_MAX, KeyIndex
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
