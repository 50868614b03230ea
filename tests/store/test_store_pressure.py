"""Back-pressure: what was acknowledged leaves DRAM only for SSD, and writers wait for that."""

import pytest
from kvstore.core.types import EndReason, ReserveStatus

from tests.store.rig import BLOCK, Rig, chain

SLOT, FULL = ReserveStatus.SLOT, ReserveStatus.FULL
DRAM = 16
PARTS = 4 * DRAM // 4


def lost(rig: Rig) -> int:
    names = ("evicted_without_ssd_blocks", "ssd_given_up_blocks", "evicted_not_admitted_blocks")
    return sum(rig.core.counters.get(name, 0) for name in names)


@pytest.mark.parametrize("one_chain", [True, False], ids=["one chain", "many chains"])
@pytest.mark.parametrize("writers", [1, 5])
def test_a_burst_of_four_times_dram_loses_nothing_acknowledged(
    writers: int, one_chain: bool
) -> None:
    """The disk ends one write, at most, for each block that is offered."""
    rig = Rig(DRAM, 8 * DRAM)
    long = chain("burst", 4 * PARTS)
    parts = [long[4 * n : 4 * n + 4] if one_chain else chain(f"{n}", 4) for n in range(PARTS)]
    for session in range(1, writers + 1):
        rig.open(session)
    waiting: dict[int, tuple[int, list[bytes]]] = {}  # by request: session and keys
    acked: list[list[bytes]] = []
    todo = list(enumerate(parts))
    while todo or waiting:
        free = [s for s in range(1, writers + 1) if s not in {s for s, _ in waiting.values()}]
        for session in free[: len(todo)]:
            number, keys = todo.pop(0)
            parent = parts[number - 1][-1] if one_chain and number else b""
            request = rig.reserve(keys, session=session, parent=parent, timeout_s=60.0)
            waiting[request] = (session, keys)
        for request, (session, keys) in list(waiting.items()):
            if (session, request) in rig.answers:
                assert rig.reserved(request, session).statuses == bytes([SLOT] * 4)
                rig.fill(request, keys, session)
                rig.commit(request, keys, [0, 1, 2, 3], session=session)
                acked.append(keys)
                del waiting[request]
        if rig.disk.writes:
            rig.end_writes(rig.disk.writes[:1])
        rig.check()
    assert len(acked) == PARTS
    assert lost(rig) == 0
    held = {key for (_, key), here in rig.stored.items() if here}
    assert held == {key for keys in parts for key in keys}
    rig.settle()
    assert len(rig.disk.index) == 4 * PARTS
    for keys in parts:
        assert rig.get(keys) == (4, EndReason.COMPLETE)
    rig.check()


def test_a_writer_waits_as_long_as_it_said_and_is_refused_then() -> None:
    rig = Rig(8, 64)
    rig.open()
    rig.put(chain("a", 8))
    first = rig.reserve(chain("b", 4), timeout_s=2.0)
    second = rig.reserve(chain("c", 4), timeout_s=5.0)
    rig.tick(1.9)
    assert (1, first) not in rig.answers
    rig.tick(0.1)
    assert rig.reserved(first).statuses == bytes([FULL] * 4)
    rig.end_writes(rig.disk.writes[4:])  # the end of the chain: it may go first
    assert rig.reserved(second).statuses == bytes([SLOT] * 4)
    assert rig.core.counters["refused_full_blocks"] == 4
    rig.apply(rig.core.abort(1, rig.next_id(), second, [], rig.now))
    rig.settle()
    assert rig.get(chain("a", 8)) == (8, EndReason.COMPLETE)
    rig.check()


def test_a_reserve_gets_what_there_is_and_no_acknowledged_block_goes_for_the_rest() -> None:
    rig = Rig(8, 64)
    rig.open()
    rig.put(chain("a", 6))
    request = rig.reserve(chain("b", 4), timeout_s=1.0)
    rig.tick(1.0)
    assert rig.reserved(request).statuses == bytes([SLOT, SLOT, FULL, FULL])
    assert rig.get(chain("a", 6)) == (6, EndReason.COMPLETE)


def test_few_blocks_leave_a_small_tier_at_a_time_for_those_that_come() -> None:
    """Removed before the new ones are written, they would all be lost to a kill -9 right then."""
    rig = Rig(32, 16)
    rig.open()
    rig.put(chain("a", 16))
    rig.settle()
    rig.put(chain("b", 16))
    while rig.disk.pending:
        while rig.disk.drops:
            rig.end_drop(rig.disk.drops[0])
        assert len(rig.disk.index) >= 11  # a quarter, and the one that is kept free
        rig.end_writes(rig.disk.writes[:])
    assert len(rig.disk.index) >= 15
    rig.check()


def test_a_write_that_is_out_keeps_its_block_in_dram() -> None:
    """Also one that failed and is tried again; only what is given up may go, and is counted."""
    rig = Rig(4, 16, writes_in_flight_max=2)
    rig.open()
    rig.put(chain("a", 4))
    for _ in range(2):
        assert rig.put(chain("b", 4)) == bytes([FULL] * 4)
        rig.end_writes(rig.disk.writes[:], fail=True)
        rig.check()
    assert rig.put(chain("b", 4)) == bytes([FULL] * 4)
    while not rig.core.counters.get("ssd_given_up_blocks"):
        rig.end_writes(rig.disk.writes[:], fail=True)
    rig.settle()
    assert rig.put(chain("b", 4)).count(SLOT) >= 1
    assert rig.core.counters["evicted_without_ssd_blocks"] >= 1
    assert rig.core.usage()[0].capacity_bytes == 4 * BLOCK
    rig.check()


def test_what_the_policy_gave_up_makes_room_at_once_and_is_counted() -> None:
    rig = Rig(8, 64, ssd_admission="second-use")
    rig.open()
    for number in range(8):
        assert rig.put(chain(f"{number}", 4)) == bytes([SLOT] * 4)
    assert not rig.disk.pending
    assert lost(rig) == rig.core.counters["evicted_not_admitted_blocks"] == 24
    rig.check()
