"""Copies on SSD that are looked at again: which are named, and what happens to the bad ones."""

import pytest
from kvstore.core import scrub
from kvstore.core.scrub import ScrubSsd
from kvstore.core.types import EndReason, IoOutcome, Tier

from tests.store.rig import BLOCK, Rig, chain

A, B = chain("a", 16), chain("b", 4)


def all_copies(rig: Rig, bytes_max: int = 4 * BLOCK) -> list[ScrubSsd]:
    """Every copy of one pass."""
    found: list[ScrubSsd] = []
    row = 0
    while row >= 0:
        copies, row = rig.core.scrub_next(row, bytes_max)
        assert sum(copy.nbytes for copy in copies) <= max(bytes_max, BLOCK)
        assert [c.ssd_offset for c in copies] == sorted(c.ssd_offset for c in copies)
        found += copies
    return found


def settle(rig: Rig, copies: list[ScrubSsd], outcome: IoOutcome) -> None:
    rig.apply(rig.core.scrub_done([(copy, outcome) for copy in copies], rig.now))


@pytest.mark.parametrize("bytes_max", [1, BLOCK, 4 * BLOCK, 1 << 30])
@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_a_pass_names_every_copy_once(
    tiers: Rig, bytes_max: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scrub, "ROWS_PER_CALL", rows)
    assert all_copies(tiers, bytes_max) == []
    tiers.put_on_ssd_only(A)
    copies = all_copies(tiers, bytes_max)
    assert sorted(copy.key for copy in copies) == sorted(A)
    for copy in copies:
        record = tiers.disk.index[copy.key]
        assert copy.ssd_offset.to_bytes(8, "little") in record


def test_good_copies_stay(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A)
    settle(tiers, all_copies(tiers), IoOutcome.OK)
    assert tiers.core.counters["scrubbed_blocks"] == 16
    assert "scrub_corrupt_blocks" not in tiers.core.counters
    assert tiers.disk.drops == []
    assert tiers.core.usage()[1].blocks == 16


@pytest.mark.parametrize(
    ("outcome", "counter"),
    [
        (IoOutcome.CORRUPT, "scrub_corrupt_blocks"),
        (IoOutcome.FAILED, "scrub_read_errors"),
    ],
)
def test_I1_a_bad_copy_is_dropped_and_a_miss(tiers: Rig, outcome: IoOutcome, counter: str) -> None:
    tiers.put_on_ssd_only(A[:4])
    bad = next(copy for copy in all_copies(tiers) if copy.key == A[2])
    settle(tiers, [bad], outcome)
    assert [op.key for op in tiers.disk.drops] == [A[2]]
    assert tiers.core.counters[counter] == 1
    assert tiers.get(A[:4]) == (2, EndReason.CORRUPT)
    tiers.settle()
    assert A[2] not in tiers.disk.index


def test_a_block_that_is_in_dram_is_written_anew(tiers: Rig) -> None:
    tiers.put(A[:2])
    tiers.settle()
    settle(tiers, all_copies(tiers), IoOutcome.CORRUPT)
    assert len(tiers.disk.drops) == 2
    tiers.settle()
    assert set(tiers.disk.index) == set(A[:2])
    assert tiers.core.counters["ssd_written_blocks"] == 4


def test_copies_that_left_meanwhile_are_not_touched(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    copies = all_copies(tiers)
    effects, _ = tiers.core.evict(Tier.SSD, b"", 0, True, tiers.now)
    tiers.apply(effects)
    settle(tiers, copies, IoOutcome.CORRUPT)
    tiers.settle()
    tiers.put_on_ssd_only(B)  # in the same rows and slots
    settle(tiers, copies, IoOutcome.CORRUPT)
    assert tiers.disk.drops == []
    assert "scrubbed_blocks" not in tiers.core.counters
    assert tiers.get(B) == (4, EndReason.COMPLETE)


def test_a_block_that_is_being_read_is_left_to_that_read(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    copies = all_copies(tiers)
    request = tiers.acquire(A[:4], timeout_s=60.0)
    assert tiers.disk.reads
    settle(tiers, copies, IoOutcome.CORRUPT)
    assert tiers.disk.drops == []
    tiers.settle()
    assert len(tiers.granted(request)) == 4
    tiers.release(request)


def test_those_who_wait_for_a_dropped_block_hear_of_it(tiers: Rig) -> None:
    rig = Rig(8, 32, reads_in_flight_max=1)
    rig.open()
    rig.put_on_ssd_only(A[:4])
    copies = all_copies(rig)
    request = rig.acquire(A[:4], timeout_s=60.0)
    assert [op.key for op in rig.disk.reads] == A[:1]
    settle(rig, [copy for copy in copies if copy.key == A[2]], IoOutcome.CORRUPT)
    rig.settle()
    end = rig.end(request)
    assert end is not None
    assert end == (2, EndReason.CORRUPT)
    rig.release(request)
    rig.check()
