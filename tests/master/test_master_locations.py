"""The index against a plain dict of sets, and what it promises about size and speed."""

import random
import time
from collections import defaultdict

import pytest
from kvstore.core.keys import split_keys
from kvstore.core.locations import EMPTY_SETS_MAX, Locations
from kvstore.core.place_sets import Place
from kvstore.core.types import EndReason, Tier
from kvstore.errors import InvalidArgumentError

ROOT = b"r" * 32


def keys(*numbers: int) -> bytes:
    return b"".join(n.to_bytes(32, "big") for n in numbers)


def runs(locations: Locations, *numbers: int) -> list[tuple[int, int, str, str]]:
    return [
        (run.first, run.count, run.place.node_id, run.place.tier.name)
        for run in locations.locate(keys(*numbers)).runs
    ]


@pytest.fixture
def index() -> Locations:
    return Locations()


def test_a_prompt_in_one_place_is_one_run(index: Locations) -> None:
    index.stored(index.place("a", Tier.DRAM, ROOT), keys(*range(100)))
    index.stored(index.place("b", Tier.DRAM, ROOT), keys(*range(0, 100, 2)))
    assert runs(index, *range(100)) == [(0, 100, "a", "DRAM")]


def test_the_fastest_tier_of_each_key_is_named(index: Locations) -> None:
    index.stored(index.place("a", Tier.SSD, ROOT), keys(*range(10)))
    index.stored(index.place("a", Tier.DRAM, ROOT), keys(*range(4)))
    assert runs(index, *range(12)) == [(0, 4, "a", "DRAM"), (4, 6, "a", "SSD")]


def test_a_run_prefers_the_place_that_goes_on(index: Locations) -> None:
    index.stored(index.place("a", Tier.DRAM, ROOT), keys(0))
    index.stored(index.place("b", Tier.DRAM, ROOT), keys(0, 1, 2))
    assert runs(index, 0, 1, 2) == [(0, 3, "b", "DRAM")]


def test_copies_name_every_place(index: Locations) -> None:
    index.stored(index.place("a", Tier.SSD, ROOT), keys(0, 1, 2))
    index.stored(index.place("a", Tier.HBM, ROOT, "engine"), keys(1))
    found = index.copies(keys(0, 1, 2, 3))
    assert [(r.first, r.count, r.place.tier.name) for r in found.runs] == [
        (0, 3, "SSD"),
        (1, 1, "HBM"),
    ]
    assert (found.found, found.reason) == (3, EndReason.NEVER_STORED)


def test_a_miss_has_its_reason(index: Locations) -> None:
    place = index.place("a", Tier.DRAM, ROOT)
    index.stored(place, keys(0, 1, 2))
    index.stored(index.place("b", Tier.DRAM, ROOT), keys(3))
    index.removed(place, keys(1))
    index.remove_node("b")
    assert index.locate(b"").reason is EndReason.COMPLETE
    assert index.locate(keys(0)).reason is EndReason.COMPLETE
    assert index.locate(keys(0, 1)).reason is EndReason.EVICTED
    assert index.locate(keys(3)).reason is EndReason.NODE_LOST
    assert index.locate(keys(9)).reason is EndReason.NEVER_STORED
    index.expect_purge(ROOT)
    index.removed(place, keys(2))
    assert index.locate(keys(2)).reason is EndReason.PURGED
    assert index.ghosts == 3
    index.stored(place, keys(1, 2))
    index.removed(place, keys(2))
    assert index.locate(keys(2)).reason is EndReason.EVICTED


def test_a_lost_node_that_comes_back_is_found_again(index: Locations) -> None:
    index.stored(index.place("a", Tier.DRAM, ROOT), keys(0, 1))
    held = index.remove_node("a")
    assert [(p.node_id, p.tier) for p in held] == [("a", Tier.DRAM)]
    assert index.remove_node("a") == []
    index.stored(index.place("a", Tier.SSD, ROOT), keys(0, 1))
    assert runs(index, 0, 1) == [(0, 2, "a", "SSD")]
    assert index.counts() == {index.place("a", Tier.SSD, ROOT): 2}


def test_a_full_index_refuses_new_keys_only() -> None:
    index = Locations(keys_max=3)
    dram, ssd = index.place("a", Tier.DRAM, ROOT), index.place("a", Tier.SSD, ROOT)
    assert index.stored(dram, keys(0, 1, 2, 3)) == 1
    assert index.stored(ssd, keys(0, 1, 2)) == 0
    assert index.places_of(keys(3)) == ()
    index.removed(dram, keys(0))
    index.removed(ssd, keys(0))
    assert index.stored(dram, keys(3)) == 0, "a ghost gives way to a block"
    assert index.entries == 5


def test_a_set_that_is_about_to_have_its_first_key_stays() -> None:
    index = Locations(keys_max=1)
    for n in range(3 * EMPTY_SETS_MAX):
        place = index.place("a", Tier.HBM, ROOT, f"engine-{n}")
        assert index.stored(place, keys(n)) == 0
        assert index.counts() == {place: 1}
        index.removed(place, keys(n))


def test_a_full_index_is_not_gone_through_for_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    index = Locations(keys_max=1000)
    place = index.place("a", Tier.DRAM, ROOT)
    passes: list[int] = []
    find = index._oldest_ghosts

    def counted(count: int) -> list[bytes]:
        passes.append(count)
        return find(count)

    monkeypatch.setattr(index, "_oldest_ghosts", counted)
    assert index.stored(place, keys(*range(3000))) == 2000
    assert index.stored(place, keys(*range(2000))) == 1000
    assert not passes, "without ghosts there is nothing to be found"
    index.removed(place, keys(*range(100)))
    assert index.stored(place, keys(*range(1000, 1200))) == 100
    assert passes == [100], "one pass for all ghosts"
    assert (index.entries, index.ghosts) == (1000, 0)


def test_I7_ghosts_are_bounded() -> None:
    index = Locations(ghosts_max=100)
    place = index.place("a", Tier.DRAM, ROOT)
    for start in range(0, 5000, 50):
        batch = keys(*range(start, start + 50))
        index.stored(place, batch)
        index.removed(place, batch)
        assert index.ghosts <= 100
    index.stored(place, keys(*range(300)))
    index.remove_node("a")
    assert index.ghosts > 100
    for _ in range(10):
        index.trim(50)
    assert 0 < index.ghosts <= 100
    assert index.entries == 0


def test_a_page_lists_whole_keys_in_order(index: Locations) -> None:
    for tier in (Tier.DRAM, Tier.SSD):
        index.stored(index.place("a", tier, ROOT), keys(*range(5)))
    index.stored(index.place("b", Tier.DRAM, ROOT), keys(7))
    page = index.pager()(lambda place: True, b"", 3)
    assert [(key[-1], len(places)) for key, places in page.rows] == [(0, 2)]
    seen, after = [], b""
    while True:
        page = index.pager()(lambda place: place.tier is Tier.DRAM, after, 2)
        seen += [(key[-1], places[0].node_id) for key, places in page.rows]
        if not (after := page.next):
            break
    assert seen == [(n, "a") for n in range(5)] + [(7, "b")]
    assert index.pager()(lambda place: place.node_id == "c", b"", 10).rows == []


def test_keys_that_are_no_keys_are_refused(index: Locations) -> None:
    with pytest.raises(InvalidArgumentError):
        index.stored(index.place("a", Tier.DRAM, ROOT), b"short")


def edges(index: Locations) -> int:
    """Links between sets of places, counted from every set that is still there."""
    groups = [index._never, *index._all()]
    return sum(len(g.with_place) + len(g.without) + len(g.sources) for g in groups)


def test_I7_combinations_of_places_that_no_key_has_are_forgotten() -> None:
    index = Locations(ghosts_max=10)
    rng = random.Random(1)
    places = [index.place("a", Tier.HBM, ROOT, f"engine-{n}") for n in range(12)]
    held: dict[int, set[Place]] = defaultdict(set)
    for _ in range(5000):
        key, place = rng.randrange(20), rng.choice(places)
        if place in held[key]:
            index.removed(place, keys(key))
        else:
            index.stored(place, keys(key))
        held[key] ^= {place}
    combinations = {frozenset(one) for one in held.values()}
    groups_max = len(combinations) + EMPTY_SETS_MAX
    assert len(index._all()) <= groups_max
    assert edges(index) <= 4 * len(places) * groups_max
    small = Locations()
    for key, one in held.items():
        for place in one:
            small.stored(place, keys(key))
    assert index.memory_bytes() <= small.memory_bytes() + 1024 * groups_max


def test_a_removal_does_not_go_through_all_combinations_of_places(
    index: Locations, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = index.place("a", Tier.DRAM, ROOT)
    index.stored(place, keys(*range(10)))

    def all_of_them() -> None:
        raise AssertionError("went through every set of places")

    monkeypatch.setattr(index, "_all", all_of_them)
    index.removed(place, keys(3))
    index.trim()
    assert index.ghosts == 1
    assert index.memory_bytes() > 0


class Model:
    """The same index, as plainly as it can be written."""

    def __init__(self) -> None:
        self.places: dict[bytes, set[tuple[str, Tier, str]]] = defaultdict(set)

    def strip(self, node_id: str) -> None:
        for places in self.places.values():
            places -= {p for p in places if p[0] == node_id}

    def locate(self, wanted: list[bytes]) -> list[tuple[str, Tier]]:
        """The fastest tier of each leading key, with one of its nodes left open."""
        found: list[tuple[str, Tier]] = []
        for key in wanted:
            if not self.places[key]:
                break
            found.append(("", min(tier for _, tier, _ in self.places[key])))
        return found


def step(index: Locations, model: Model, rng: random.Random) -> None:
    node, engine = rng.choice("abc"), rng.choice(["", "e1", "e2"])
    tier = Tier.HBM if engine else rng.choice([Tier.DRAM, Tier.SSD])
    root = ROOT
    batch = keys(*(rng.randrange(40) for _ in range(rng.randrange(12))))
    name = (node, tier, engine)
    match rng.randrange(10):
        case 0:
            index.remove_node(node)
            model.strip(node)
        case 1:
            cleared = index.clear(index.place(node, tier, root, engine))
            assert cleared == sum(name in places for places in model.places.values())
            for places in model.places.values():
                places.discard(name)
        case 2 | 3 | 4:
            index.removed(index.place(node, tier, root, engine), batch)
            for key in split_keys(batch):
                model.places[key].discard(name)
        case _:
            index.stored(index.place(node, tier, root, engine), batch)
            for key in split_keys(batch):
                model.places[key].add(name)


def check(index: Locations, model: Model, rng: random.Random) -> None:
    for key, places in model.places.items():
        assert {(p.node_id, p.tier, p.engine_id) for p in index.places_of(key)} == places
    wanted = split_keys(keys(*(rng.randrange(40) for _ in range(12))))
    located = index.locate(b"".join(wanted))
    expected = model.locate(wanted)
    assert located.found == len(expected)
    tiers = [run.place.tier for run in located.runs for _ in range(run.count)]
    assert tiers == [tier for _, tier in expected]
    for run in located.runs:
        for key in wanted[run.first : run.first + run.count]:
            assert run.place in index.places_of(key)
    counts: dict[Place, int] = index.counts()
    assert sum(counts.values()) == index.entries == sum(map(len, model.places.values()))
    held = sum(1 for places in model.places.values() if places)
    assert index.ghosts == sum(not group.places for group in index._table.values())
    groups = set(index._all())
    assert {group for group in groups if group.keys} == set(index._table.values())
    assert sum(not group.keys for group in groups) <= EMPTY_SETS_MAX
    for group in groups | {index._never}:
        to = {*group.with_place.values(), *group.without.values()} - {group}
        assert to <= groups
        assert all(group in other.sources for other in to)
        assert group.sources.keys() <= groups | {index._never}
    assert index.namespace_keys().get(ROOT, 0) == held


@pytest.mark.parametrize("seed", range(20))
def test_I1_the_index_neither_loses_nor_invents_a_block(seed: int) -> None:
    rng = random.Random(seed)
    index, model = Locations(ghosts_max=rng.choice([0, 5, 1000])), Model()
    for _ in range(150):
        step(index, model, rng)
        check(index, model, rng)


def test_a_million_blocks_are_small_and_a_node_is_forgotten_at_once() -> None:
    index = Locations(ghosts_max=1 << 30)
    rng = random.Random(1)
    blocks = 200_000
    for tier in (Tier.DRAM, Tier.SSD):
        rng.seed(1)
        for _ in range(blocks // 8000):
            index.stored(index.place("a", tier, ROOT), rng.randbytes(32 * 8000))
    assert index.memory_bytes() / blocks < 200
    started = time.perf_counter()
    index.remove_node("a")
    assert time.perf_counter() - started < 0.02
    assert index.entries == 0
