"""Slots of one tier: consecutive, exact, shared by size classes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kvstore.core.slots import Offsets, SlotSpace
from kvstore.errors import InvalidArgumentError

PAGE = 4096


def test_slots_given_out_together_lie_one_behind_the_other() -> None:
    space = SlotSpace(256 << 20, 4 << 20)
    first, spans = space.allocate(1 << 20, 64)
    assert first.tolist() == [i << 20 for i in range(64)]
    assert sum(nbytes for _, nbytes in spans) == 64 << 20
    space.free(1 << 20, first[8:40], "pending")
    again, spans = space.allocate(1 << 20, 32)
    assert again.tolist() == first[8:40].tolist()
    assert not spans
    space.check({1 << 20: first})


@pytest.mark.parametrize("slot_bytes", [PAGE, 3 * PAGE, 1 << 20, 2_949_120, 5 << 20])
def test_rounding_leaves_little_unused(slot_bytes: int) -> None:
    space = SlotSpace(512 << 20, 4 << 20)
    assert space.slots_max(slot_bytes) * slot_bytes >= 0.85 * (512 << 20)
    offsets, _ = space.allocate(slot_bytes, 1 << 20)
    assert len(offsets) == space.slots_max(slot_bytes)
    assert (np.sort(offsets) == np.unique(offsets)).all()
    space.check({slot_bytes: offsets})


def test_slot_larger_than_the_tier_is_refused() -> None:
    space = SlotSpace(10 * PAGE, PAGE)
    assert space.slots_max(11 * PAGE) == space.slots_max(0) == 0
    assert space.slots_max(10 * PAGE) == 1
    with pytest.raises(InvalidArgumentError, match="does not fit"):
        space.allocate(11 * PAGE, 1)
    assert SlotSpace(100, PAGE).slots_max(PAGE) == 0


def test_empty_spans_go_to_the_class_that_needs_them() -> None:
    space = SlotSpace(64 * PAGE, 8 * PAGE)
    small, _ = space.allocate(PAGE, 64)
    assert len(space.allocate(2 * PAGE, 1)[0]) == 0
    space.free(PAGE, small[:32], "pending")
    large, spans = space.allocate(2 * PAGE, 40)
    assert len(large) == 16
    assert sum(nbytes for _, nbytes in spans) == 32 * PAGE
    space.check({PAGE: small[32:], 2 * PAGE: large})


def test_claim_takes_places_as_they_were() -> None:
    space = SlotSpace(64 * PAGE, 8 * PAGE)
    bad = [5, -PAGE, 64 * PAGE, 3 * PAGE]
    offsets = np.array([0, 3 * PAGE, 17 * PAGE, *bad])
    assert space.claim(PAGE, offsets).tolist() == [True] * 3 + [False] * 4
    assert space.claim(2 * PAGE, np.array([0, 8 * PAGE])).tolist() == [False, True]
    assert not space.claim(100, np.array([0])).any()
    space.check({PAGE: offsets[:3], 2 * PAGE: np.array([8 * PAGE])})
    assert space.live_bytes == 5 * PAGE


def test_wrong_accounts_are_found() -> None:
    space = SlotSpace(8 * PAGE, PAGE)
    offsets, _ = space.allocate(PAGE, 3)
    with pytest.raises(AssertionError, match="used"):
        space.check({PAGE: offsets[:2]})
    space.move(PAGE, "pending", "live")
    space.move(PAGE, "pending", "quarantined")
    space.check({PAGE: offsets})
    space.live_bytes += 1
    with pytest.raises(AssertionError, match="counted"):
        space.check({PAGE: offsets})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([PAGE, 2 * PAGE, 3 * PAGE, 7 * PAGE]), st.integers(-9, 9)),
        max_size=40,
    )
)
def test_I6_any_history_adds_up(steps: list[tuple[int, int]]) -> None:
    space = SlotSpace(128 * PAGE, 4 * PAGE)
    used: dict[int, Offsets] = {}
    for slot_bytes, count in steps:
        mine = used.get(slot_bytes, np.zeros(0, dtype=np.int64))
        if count >= 0:
            mine = np.concatenate((mine, space.allocate(slot_bytes, count)[0]))
        elif len(mine):
            space.free(slot_bytes, mine[:-count], "pending")
            mine = mine[-count:]
        used[slot_bytes] = mine
        space.check({size: offsets for size, offsets in used.items() if len(offsets)})
        pages = [o // PAGE + i for s, all_ in used.items() for o in all_ for i in range(s // PAGE)]
        assert len(pages) == len(set(pages)), "slots overlap"
        assert space.free_bytes + space.pending_bytes == 128 * PAGE
