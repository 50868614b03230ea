import random
from collections.abc import Iterable

import pytest
from kvstore.core.fsck import Examination, Fault, count_faults
from kvstore.core.ssd_record import NO_PARENT, SsdRecord
from kvstore.core.types import IoOutcome

PAGE = 4096
ROOT, OTHER = b"r" * 32, b"o" * 32
FILE_BYTES = 64 * PAGE


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def record(
    number: int,
    page: int,
    parent: bytes = NO_PARENT,
    *,
    root: bytes = ROOT,
    nbytes: int = 2 * PAGE,
    sequence: int | None = None,
) -> SsdRecord:
    place = page * PAGE
    return SsdRecord(key(number), root, parent, nbytes, place, (number,), sequence or number)


def examine(records: Iterable[SsdRecord]) -> Examination:
    entries = [(r.key, r.encode()) for r in records]
    sizes = {ROOT: 2 * PAGE, OTHER: 3 * PAGE - 100, b"x" * 32: None}
    return Examination([k for k, _ in entries], [v for _, v in entries], sizes, FILE_BYTES)


def faults(examination: Examination) -> dict[int, Fault]:
    """What was found by the number of the record, all reads being right."""
    for sound in examination.sound:
        examination.read(sound, IoOutcome.OK)
    return {int.from_bytes(f.key, "big"): f.fault for f in examination.finish()}


def test_a_chain_is_clean_and_read_in_the_order_of_the_file() -> None:
    examination = examine([record(1, 4), record(2, 0, key(1)), record(3, 2, key(2))])
    assert [r.ssd_offset for r in examination.sound] == [0, 2 * PAGE, 4 * PAGE]
    assert faults(examination) == {}


def test_nothing_is_clean() -> None:
    assert faults(examine([])) == {}


def test_malformed_entries() -> None:
    good = record(1, 0)
    examination = Examination(
        [good.key, key(2), b"short"],
        [good.encode(), b"x" * 50, good.encode()],
        {ROOT: 2 * PAGE},
        PAGE * 9,
    )
    found = faults(examination)
    assert list(found.values()) == [Fault.MALFORMED] * 2
    assert [r.key for r in examination.sound] == [good.key]


def test_foreign_records() -> None:
    found = faults(examine([record(1, 0, root=b"x" * 32), record(2, 2, nbytes=PAGE)]))
    assert found == {1: Fault.FOREIGN, 2: Fault.FOREIGN}


def test_a_namespace_that_was_not_noted_may_be_used() -> None:
    unknown = b"?" * 32
    records = [record(1, 0, root=unknown), record(2, 4, root=unknown, nbytes=0)]
    assert faults(examine(records)) == {2: Fault.OUTSIDE}


@pytest.mark.parametrize("page", [63, 64, 1 << 40])
def test_records_outside_of_the_file(page: int) -> None:
    assert faults(examine([record(1, 62), record(2, page)])) == {2: Fault.OUTSIDE}


def test_a_place_that_is_no_slot() -> None:
    crooked = record(1, 0)._replace(ssd_offset=100)
    assert faults(examine([crooked])) == {1: Fault.OUTSIDE}


def test_of_overlapping_records_the_newest_stays() -> None:
    # 3 is between 1 and 2, and older than both; 4 is older than 5 at the same place.
    records = [record(1, 0), record(2, 3), record(3, 2), record(4, 10), record(5, 10)]
    records[2] = records[2]._replace(sequence=0)
    assert faults(examine(records)) == {3: Fault.OVERLAP, 4: Fault.OVERLAP}


def test_an_old_record_stays_between_two_that_lose() -> None:
    # Slots 0-1, 1-2, 2-3: the middle one is newest, so that both others go; and the other way.
    middle = [record(1, 0, sequence=1), record(2, 1, sequence=9), record(3, 2, sequence=2)]
    assert faults(examine(middle)) == {1: Fault.OVERLAP, 3: Fault.OVERLAP}
    ends = [record(1, 0, sequence=2), record(2, 1, sequence=1), record(3, 2, sequence=3)]
    assert faults(examine(ends)) == {2: Fault.OVERLAP}


def test_slots_are_whole_pages() -> None:
    tail = record(1, 0, root=OTHER, nbytes=3 * PAGE - 100)
    assert faults(examine([tail, record(2, 2, sequence=9)])) == {1: Fault.OVERLAP}
    assert faults(examine([tail, record(2, 3, sequence=9)])) == {}


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [(IoOutcome.CORRUPT, Fault.CORRUPT), (IoOutcome.FAILED, Fault.UNREADABLE)],
)
def test_blocks_behind_a_bad_one_are_orphans(outcome: IoOutcome, fault: Fault) -> None:
    examination = examine([record(1, 0), *(record(n, 2 * n, key(n - 1)) for n in (2, 3, 4))])
    for sound in examination.sound:
        examination.read(sound, outcome if sound.key == key(2) else IoOutcome.OK)
    findings = examination.finish()
    assert count_faults(findings) == {fault: 1, Fault.ORPHAN: 2}
    assert {f.key for f in findings} == {key(2), key(3), key(4)}


def test_orphans_of_a_missing_parent_of_another_namespace_and_in_a_ring() -> None:
    records = [
        record(1, 0, key(99)),
        record(2, 4, root=OTHER, nbytes=3 * PAGE - 100),
        record(3, 8, key(2)),
        record(4, 10, key(5)),
        record(5, 12, key(4)),
        record(6, 14, ROOT),
    ]
    assert faults(examine(records)) == dict.fromkeys((1, 3, 4, 5), Fault.ORPHAN)


def test_what_is_left_after_dropping_is_clean() -> None:
    seed = random.randrange(1 << 32)
    print(f"seed={seed:#x}")
    draw = random.Random(seed)
    for _ in range(50):
        records = [
            record(
                n, draw.randrange(70), key(draw.randrange(n)) if draw.random() < 0.7 else NO_PARENT
            )
            for n in range(1, 20)
        ]
        bad = faults(examine(records))
        rest = [r for r in records if int.from_bytes(r.key, "big") not in bad]
        assert faults(examine(rest)) == {}
        pages = [p for r in rest for p in range(r.ssd_offset // PAGE, r.ssd_offset // PAGE + 2)]
        assert len(set(pages)) == len(pages)
