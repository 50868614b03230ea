"""Eviction policies against plain models, on random forests."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from kvstore.core.eviction import make_policy
from kvstore.core.forest import closed_under_children, raise_above_children, spread_down, spread_up
from kvstore.core.ghosts import Ghosts
from kvstore.core.table import DramState, Mask, Rows, Table
from kvstore.core.types import EndReason, Tier
from kvstore.errors import ResourceExhaustedError

from tests.store.rig import chain


class Forest:
    """A table with blocks in DRAM, and a plain list of who was used when."""

    def __init__(self, policy: str) -> None:
        self.table = Table(1 << 16)
        self.policy = make_policy(policy, self.table, Tier.DRAM)
        self.used: dict[int, int] = {}
        self.clock = 0
        self.made = 0

    def add(self, parent: int, count: int) -> Rows:
        keys = chain(f"forest {self.made}", count)
        self.made += 1
        rows = self.table.add(keys, 0)
        self.table.link(rows, np.concatenate(([parent], rows[:-1])))
        self.table.dram_state[rows] = DramState.LIVE
        self.table.count_children(self.table.dram_children, rows, 1)
        self.policy.inserted(rows)
        self.note(rows)
        return rows

    def note(self, rows: Rows) -> None:
        for row in reversed(rows.tolist()):
            self.clock += 1
            self.used[row] = self.clock

    def touch(self, rows: Rows) -> None:
        self.policy.touched(rows)
        self.note(rows)

    def remove(self, rows: Rows) -> None:
        for row in rows.tolist():
            assert self.table.dram_children[row] == 0, "a block went before its child"
            one = np.array([row])
            self.table.count_children(self.table.dram_children, one, -1)
            self.table.dram_state[row] = DramState.NONE
            del self.used[row]
        self.table.discard_empty(np.sort(rows))

    def path(self, row: int) -> Rows:
        rows = []
        while row >= 0:
            rows.append(row)
            row = int(self.table.parent[row])
        return np.array(rows[::-1])

    def plain_choice(self, count: int, pinned: set[int]) -> list[int]:
        """Leaf by leaf, the least recently used one first."""
        children = {row: int(self.table.dram_children[row]) for row in self.used}
        chosen: list[int] = []
        while len(chosen) < count:
            leaves = [r for r, n in children.items() if n == 0 and r not in pinned]
            if not leaves:
                break
            row = min(leaves, key=self.used.__getitem__)
            chosen.append(row)
            del children[row]
            parent = int(self.table.parent[row])
            if parent in children:
                children[parent] -= 1
        return chosen


def random_use(forest: Forest, rng: random.Random, steps: int) -> None:
    for _ in range(steps):
        rows = list(forest.used)
        action = rng.random()
        if action < 0.4 or not rows:
            parent = rng.choice([-1, *rows]) if rows else -1
            forest.add(parent, rng.randint(1, 12))
        elif action < 0.7:
            path = forest.path(rng.choice(rows))
            forest.touch(path[: rng.randint(1, len(path))])
        elif action < 0.8:
            forest.touch(np.array([rng.choice(rows)]))
        else:
            pinned = set(rng.sample(rows, min(len(rows), rng.choice([0, 0, 2, 30]))))
            count = rng.randint(1, 20)
            chosen = forest.policy.select(count, eligible_but(pinned))
            check_choice(forest, chosen, count, pinned)
            forest.remove(chosen)
        forest.table.check()


def eligible_but(pinned: set[int]) -> Callable[[Rows], Mask]:
    return lambda rows: ~np.isin(rows, list(pinned))


def check_choice(forest: Forest, chosen: Rows, count: int, pinned: set[int]) -> None:
    plain = forest.plain_choice(count, pinned)
    if type(forest.policy).__name__ == "LruPolicy":
        assert chosen.tolist() == plain
    else:
        assert 0 < len(chosen) <= len(plain) or not plain


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
@pytest.mark.parametrize("seed", range(12))
def test_choice_equals_the_plain_model(policy: str, seed: int) -> None:
    forest = Forest(policy)
    random_use(forest, random.Random(seed), 150)


def test_lru_is_exact_beyond_one_window() -> None:
    forest = Forest("lru")
    rng = random.Random(5)
    for _ in range(60):
        forest.add(-1, 100)
    for _ in range(40):
        row = rng.choice(list(forest.used))
        forest.touch(forest.path(row))
    for count in (1, 700, 64, 1500, 9, 2000):
        chosen = forest.policy.select(count, eligible_but(set()))
        assert chosen.tolist() == forest.plain_choice(count, set())
        forest.remove(chosen)
        forest.add(-1, 50)
        forest.touch(forest.path(next(iter(forest.used))))


def test_s3fifo_keeps_what_is_used_again_through_a_scan() -> None:
    hits = {}
    for name in ("lru", "s3fifo"):
        forest = Forest(name)
        hot = forest.add(-1, 20)
        keys = forest.table.key_list(hot)
        forest.touch(hot)
        forest.touch(hot)
        for _ in range(30):
            forest.add(-1, 10)
            while len(forest.used) > 60:
                forest.remove(forest.policy.select(len(forest.used) - 60, eligible_but(set())))
        hits[name] = int((forest.table.lookup(keys) >= 0).sum())
    assert hits["lru"] == 0
    assert hits["s3fifo"] == 20


def test_s3fifo_takes_blocks_that_come_back_into_the_main_queue() -> None:
    forest = Forest("s3fifo")
    rows = forest.add(-1, 4)
    forest.policy.inserted(rows, np.array([True, True, False, False]))
    other = forest.add(-1, 40)
    chosen = forest.policy.select(30, eligible_but(set()))
    assert set(chosen.tolist()) <= set(other.tolist()) | set(rows[2:].tolist())


def test_forest_questions() -> None:
    parent = np.array([-1, 0, 1, 1, 3, -1], dtype=np.int32)
    children = np.array([1, 2, 0, 1, 0, 0], dtype=np.int32)
    scratch = np.full(6, -1, dtype=np.int32)
    rows = np.array([0, 1, 3, 4, 5])
    assert closed_under_children(rows, parent, children, scratch).tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]
    marked = np.array([False, True, False, False, False, False])
    assert spread_down(marked, parent).tolist() == [False, True, True, True, True, False]
    up = np.array([-1, 0, 1, 2])
    assert spread_up(np.array([False, False, True, False]), up).tolist() == [
        True,
        True,
        True,
        False,
    ]
    assert raise_above_children(np.array([1, 5, 2, 9]), up).tolist() == [12, 11, 10, 9]
    assert not len(closed_under_children(rows[:0], parent, children, scratch))


def test_table_grows_and_is_limited() -> None:
    table = Table(3000)
    rows = table.add(chain("t", 3000), 1)
    assert np.array_equal(table.lookup(chain("t", 3000)), rows)
    assert table.key(int(rows[7])) == chain("t", 8)[7]
    assert len(table) == 3000
    with pytest.raises(ResourceExhaustedError, match="3000"):
        table.add(chain("u", 1), 1)
    table.discard_empty(rows)
    assert not len(table)


def test_ghosts_remember_the_reason_for_a_while() -> None:
    ghosts = Ghosts(1024)
    keys = chain("g", 3)
    ghosts.add(keys[0], EndReason.EVICTED)
    ghosts.add(keys[1], EndReason.CORRUPT)
    assert [ghosts.reason(key) for key in keys] == [
        EndReason.EVICTED,
        EndReason.CORRUPT,
        EndReason.NEVER_STORED,
    ]
    assert ghosts.was_evicted(b"".join(keys)).tolist() == [True, False, False]
    none = Ghosts(0)
    none.add(keys[0], EndReason.EVICTED)
    assert none.reason(keys[0]) == EndReason.NEVER_STORED
    assert not none.was_evicted(keys[0]).any()
