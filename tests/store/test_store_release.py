"""Release means its own range, granted or still to come."""

import pytest
from kvstore.core.effects import End, Granted
from kvstore.core.types import EndReason

from tests.store.rig import Rig, chain

A = chain("a", 8)


@pytest.fixture
def waiting() -> tuple[Rig, int]:
    """A rig, and an acquire of 8 blocks of which none has come from SSD yet."""
    rig = Rig(16, 32, reads_in_flight_max=1)
    rig.open()
    rig.put(A)
    rig.settle()
    rig.apply(rig.core.evict(2, b"", 0, False, rig.now)[0])  # type: ignore[arg-type]
    return rig, rig.acquire(A, timeout_s=5.0)


def indices(rig: Rig, request: int) -> list[int]:
    """Of all blocks granted, in the order in which they were."""
    bodies = rig.answers.get((1, request), [])
    runs = [run for body in bodies if isinstance(body, Granted) for run in body.runs]
    return [run.first + i for run in runs for i in range(run.count)]


def test_release_before_the_end_gives_up_its_range_alone(waiting: tuple[Rig, int]) -> None:
    rig, request = waiting
    rig.release(request, 3, 2)
    assert rig.end(request) is None
    assert rig.core.pinned_blocks() == 6
    rig.settle()
    assert indices(rig, request) == [0, 1, 2, 5, 6, 7]
    assert rig.end(request) == End(6, EndReason.COMPLETE)
    rig.check_bytes(request, A)
    rig.release(request)
    assert rig.core.pinned_blocks() == 0
    rig.check()


@pytest.mark.parametrize("first", [0, 1])
def test_block_that_is_waited_for_is_released(waiting: tuple[Rig, int], first: int) -> None:
    rig, request = waiting
    rig.release(request, 0, first + 1)
    rig.settle()
    assert indices(rig, request) == list(range(first + 1, 8))
    assert rig.end(request) == End(7 - first, EndReason.COMPLETE)
    rig.release(request)
    rig.check()


def test_released_end_of_a_chain_ends_the_acquire(waiting: tuple[Rig, int]) -> None:
    rig, request = waiting
    rig.release(request, 6, 2)
    rig.settle()
    assert indices(rig, request) == [0, 1, 2, 3, 4, 5]
    assert rig.end(request) == End(6, EndReason.RELEASED)
    rig.release(request)
    rig.check()


def test_releases_that_leave_nothing_to_come_end_the_acquire(waiting: tuple[Rig, int]) -> None:
    rig, request = waiting
    rig.end_read(rig.disk.reads[0])
    rig.release(request, 4)
    assert rig.end(request) is None
    rig.release(request, 1, 3)
    assert rig.end(request) == End(1, EndReason.RELEASED)
    rig.settle()
    rig.release(request)
    assert rig.core.pinned_blocks() == 0
    rig.check()


def test_release_beyond_what_was_held_changes_nothing(waiting: tuple[Rig, int]) -> None:
    rig, _ = waiting
    request = rig.acquire([*A, *chain("b", 4)], timeout_s=5.0)
    rig.release(request, 9, 2)
    rig.release(request, 40, 2)
    rig.settle()
    assert rig.end(request) == End(8, EndReason.NEVER_STORED)
    rig.release(request)
