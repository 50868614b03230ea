"""Work at full tiers: bounded by what is asked for, not by what the tiers hold."""

import hashlib

import pytest
from kvstore.core.eviction import base
from kvstore.core.forest import Ints, Mask, Rows, closed_under_children
from kvstore.core.tiering import Tiering
from kvstore.core.types import ReserveStatus

from tests.store.rig import Rig

PUT = 64


class Work:
    """Counts what the choice of victims goes through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.choices = self.ordered = self.seen = 0
        may_leave = Tiering._may_leave_dram

        def closed(rows: Rows, parent: Ints, children: Ints, scratch: Ints) -> Mask:
            self.choices += 1
            self.ordered += len(rows)
            return closed_under_children(rows, parent, children, scratch)

        def may_leave_dram(tiering: Tiering, rows: Rows) -> Mask:
            self.seen += len(rows)
            return may_leave(tiering, rows)

        monkeypatch.setattr(base, "closed_under_children", closed)
        monkeypatch.setattr(Tiering, "_may_leave_dram", may_leave_dram)

    def start(self) -> None:
        self.choices = self.ordered = self.seen = 0


def put(rig: Rig, number: int) -> int:
    """Stores one chain with a disk that ends what it has whenever the put waits; how often."""
    keys = [hashlib.sha256(f"{number}:{i}".encode()).digest() for i in range(PUT)]
    request = rig.reserve(keys, timeout_s=30.0)
    reports = 0
    while (1, request) not in rig.answers:
        writes, drops = rig.disk.writes[:], rig.disk.drops[:]
        assert writes or drops, "the put waits for nothing"
        if writes:
            rig.end_writes(writes)
        if drops:
            rig.disk.drops.clear()
            rig.apply(rig.core.drops_done(drops, rig.now))
        reports += bool(writes) + bool(drops)
    assert rig.reserved(request).statuses == bytes([ReserveStatus.SLOT]) * PUT
    slots = rig.fill(request, keys)
    rig.commit(request, keys, slots)
    return reports


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
@pytest.mark.parametrize("dram", [1024, 2048])
def test_a_put_at_full_tiers_costs_what_it_stores(
    monkeypatch: pytest.MonkeyPatch, dram: int, policy: str
) -> None:
    """An SSD of half the size of DRAM, where nearly all blocks in DRAM wait to be written."""
    rig = Rig(dram, dram // 2, dram_policy=policy, ssd_policy=policy, writes_in_flight_max=PUT)
    rig.open()
    puts = 4 * dram // PUT
    for number in range(puts):
        put(rig, number)
    work = Work(monkeypatch)
    reports = sum(put(rig, puts + n) for n in range(4))
    assert reports > 4, "nothing had to wait: the tiers are not full"
    assert work.ordered <= 20 * 4 * PUT, "choices went through blocks that could not go"
    assert work.choices <= 8 * reports
    assert work.seen <= 3 * reports * dram
    rig.check()
