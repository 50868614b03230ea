"""NodeCore with an SSD tier: write-behind, loads, eviction, faults, shards, restart."""

import pytest
from kvstore.core.effects import End
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel, EndReason, ReserveStatus, Tier
from kvstore.errors import InternalError

from tests.store.rig import BLOCK, Rig, chain, shuffled

A, B, C = chain("a", 16), chain("b", 16), chain("c", 16)
SLOT, HAVE, FULL, BUSY = (
    ReserveStatus.SLOT,
    ReserveStatus.HAVE,
    ReserveStatus.FULL,
    ReserveStatus.BUSY,
)


def test_commit_starts_writing_behind_at_once(tiers: Rig) -> None:
    tiers.put(A[:3])
    records = [op.record for op in tiers.disk.writes]
    assert [record.key for record in records] == A[:3]
    assert [record.parent for record in records] == [bytes(32), A[0], A[1]]
    assert [op.key for op in tiers.disk.writes] == A[:3]
    assert [op.ssd_offset for op in tiers.disk.writes] == [0, BLOCK, 2 * BLOCK]
    tiers.settle()
    assert tiers.core.usage()[1].live_bytes == 3 * BLOCK
    assert tiers.core.idle()


@pytest.mark.parametrize("level", [AckLevel.PERSISTED, AckLevel.SYNCED])
def test_I3_acknowledgement_waits_for_its_level(tiers: Rig, level: AckLevel) -> None:
    reserve = tiers.reserve(A[:3])
    tiers.fill(reserve, A)
    commit = tiers.commit(reserve, A, [2, 0, 1], level=level)
    assert tiers.levels(commit) is None
    assert not tiers.core.idle()
    tiers.end_writes(tiers.disk.writes[:2])
    assert tiers.levels(commit) is None
    tiers.settle()
    assert tiers.levels(commit) == bytes([AckLevel.SYNCED] * 3)


def test_failed_write_is_tried_again_then_acknowledged_as_memory(tiers: Rig) -> None:
    reserve = tiers.reserve(A[:1])
    tiers.fill(reserve, A)
    commit = tiers.commit(reserve, A, [0], level=AckLevel.SYNCED)
    for _ in range(3):
        assert tiers.levels(commit) is None
        tiers.end_writes(tiers.disk.writes[:], fail=True)
    assert tiers.levels(commit) == bytes([AckLevel.MEMORY])
    assert tiers.core.counters["ssd_given_up_blocks"] == 1
    assert tiers.core.usage()[1].free_bytes == 32 * BLOCK
    assert tiers.get(A[:1]) == (1, EndReason.COMPLETE)
    for name in range(4):
        tiers.put(chain(str(name), 4))
        tiers.settle()
    assert tiers.get(A[:1]) == (0, EndReason.EVICTED)
    assert tiers.core.counters["evicted_without_ssd_blocks"] == 1


def test_burst_beyond_dram_loses_nothing(tiers: Rig) -> None:
    long = chain("burst", 24)
    pick = shuffled(7)
    for first in range(0, 24, 4):
        parent = long[first - 1] if first else b""
        request = tiers.reserve(long[first : first + 4], parent=parent, timeout_s=60.0)
        while (1, request) not in tiers.answers:
            tiers.disk_step(pick)
        assert tiers.reserved(request).statuses == bytes([SLOT] * 4)
        tiers.fill(request, long[first : first + 4])
        tiers.commit(request, long[first : first + 4], [0, 1, 2, 3])
    tiers.settle()
    for first in range(0, 24, 8):
        assert tiers.get(long[: first + 8])[0] >= min(first + 8, 8)
    assert len(tiers.disk.index) == 24
    assert tiers.core.counters.get("evicted_without_ssd_blocks", 0) == 0


def test_full_ssd_evicts_its_oldest_leaves_and_removal_comes_before_reuse() -> None:
    rig = Rig(4, 8)
    rig.open()
    rig.put_on_ssd_only(A[:8])
    rig.put(B[:2])
    assert [op.key for op in rig.disk.drops] == [A[7], A[6]]
    assert not rig.disk.writes
    assert not rig.core.idle()
    rig.end_drop(rig.disk.drops[0])
    assert [op.key for op in rig.disk.writes] == [B[0]]
    rig.settle()
    assert sorted(rig.disk.index) == sorted(A[:6] + B[:2])
    assert rig.get(A[:4]) == (4, EndReason.COMPLETE)
    assert rig.get([A[6]]) == (0, EndReason.EVICTED)
    rig.check()


def test_ssd_smaller_than_dram_gives_up_rather_than_writing_in_circles() -> None:
    rig = Rig(8, 2)
    rig.open()
    rig.put(A[:8])
    steps = 0
    while rig.disk.pending:
        rig.disk_step()
        steps += 1
    assert steps < 40
    assert len(rig.disk.index) == 2
    rig.check()
    assert rig.put(B[:8]) == bytes([SLOT] * 8)
    rig.settle()
    assert rig.get(B[:8]) == (8, EndReason.COMPLETE)
    rig.check()


def test_ssd_of_protected_blocks_only_gives_new_ones_up() -> None:
    rig = Rig(4, 2)
    rig.open()
    rig.put_on_ssd_only(A[:2])
    rig.put(A[2:4], parent=A[1])
    rig.settle()
    assert rig.core.counters["ssd_given_up_blocks"] == 2
    assert rig.get(A[:4]) == (4, EndReason.COMPLETE)
    rig.check()


def test_evict_demotes_first_and_what_is_being_written_follows(tiers: Rig) -> None:
    tiers.put(A[:4])
    tiers.end_writes(tiers.disk.writes[:2])
    effects, removal = tiers.core.evict(Tier.DRAM, b"", 0, False, 0.0)
    tiers.apply(effects)
    assert (removal.blocks, removal.waiting) == (0, 4)
    tiers.settle()
    assert tiers.core.usage()[0].blocks == 0
    assert tiers.get(A[:4]) == (4, EndReason.COMPLETE)


def test_evict_from_ssd_keeps_last_copies_unless_told(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    tiers.get(A[:2])
    effects, removal = tiers.core.evict(Tier.SSD, b"", 0, False, 0.0)
    tiers.apply(effects)
    assert removal.blocks == 0, "the blocks behind those in DRAM are on SSD only"
    effects, removal = tiers.core.evict(Tier.SSD, b"".join(A[2:]), 0, True, 0.0)
    tiers.apply(effects)
    assert removal == (2, 2 * BLOCK, 0, 0)
    effects, removal = tiers.core.evict(Tier.SSD, b"", 0, False, 0.0)
    tiers.apply(effects)
    assert removal.blocks == 2
    tiers.settle()
    assert not tiers.disk.index
    assert tiers.get(A[:4]) == (2, EndReason.EVICTED)


def test_purge_while_reading_and_writing(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:3])
    waiting = tiers.acquire(A[:3], timeout_s=9.0)
    tiers.put(B[:2])
    effects, removal = tiers.core.purge(None, 0.0)
    tiers.apply(effects)
    assert removal.blocks == 5
    assert tiers.end(waiting) == End(0, EndReason.PURGED)
    assert tiers.put(A[:1] + B[:1]) == bytes([BUSY, BUSY])
    tiers.check()
    tiers.settle()
    assert not tiers.disk.index
    assert [usage.live_bytes + usage.quarantined_bytes for usage in tiers.core.usage()] == [0, 0]
    assert tiers.put(A[:2]) == bytes([SLOT, SLOT])


def test_purge_of_blocks_that_a_lease_waits_for(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:3])
    tiers.put(B[:8])
    tiers.settle()
    lease = tiers.acquire(B[:8])
    starved = tiers.acquire(A[:3], timeout_s=9.0)
    tiers.apply(tiers.core.purge(None, 0.0)[0])
    assert tiers.end(starved) == End(0, EndReason.PURGED)
    tiers.settle()
    tiers.release(lease)
    assert tiers.core.usage()[0].free_bytes == 8 * BLOCK


def test_stored_again_while_the_old_copy_is_being_removed(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:1])
    effects, _ = tiers.core.evict(Tier.SSD, A[0], 0, True, 0.0)
    tiers.apply(effects)
    assert tiers.put(A[:1]) == bytes([SLOT])
    assert not tiers.disk.writes, "the removal would take the new record with it"
    tiers.settle()
    assert list(tiers.disk.index) == [A[0]]
    assert tiers.get(A[:1]) == (1, EndReason.COMPLETE)


def test_requests_that_are_not_out_cannot_end(tiers: Rig) -> None:
    tiers.put(A[:1])
    (write,) = tiers.disk.writes
    tiers.settle()
    with pytest.raises(InternalError, match="write"):
        tiers.core.writes_done([write], True, 0.0)
    tiers.put_on_ssd_only(B[:1])
    request = tiers.acquire(B[:1], timeout_s=1.0)
    (read,) = tiers.disk.reads
    tiers.settle()
    with pytest.raises(InternalError, match="read"):
        tiers.core.reads_done([(read, 0)], 0.0)  # type: ignore[list-item]
    effects, _ = tiers.core.evict(Tier.SSD, A[0], 0, True, 0.0)
    tiers.apply(effects)
    (drop,) = tiers.disk.drops
    tiers.settle()
    with pytest.raises(InternalError, match="removal"):
        tiers.core.drops_done([drop], 0.0)
    tiers.release(request)


def test_writes_in_flight_are_bounded_by_count_and_bytes() -> None:
    rig = Rig(16, 64, writes_in_flight_max=3)
    rig.open()
    rig.put(A[:8])
    assert len(rig.disk.writes) == 3
    rig = Rig(16, 64, writes_in_flight_bytes_max=2 * BLOCK)
    rig.open()
    rig.put(A[:8])
    assert len(rig.disk.writes) == 2
    rig.settle()
    assert len(rig.disk.index) == 8
    rig.check()


def test_a_write_larger_than_the_limit_goes_alone() -> None:
    rig = Rig(16, 64, writes_in_flight_bytes_max=100)
    rig.open()
    rig.put(A[:3])
    assert len(rig.disk.writes) == 1
    rig.settle()
    assert len(rig.disk.index) == 3


def test_blocks_of_several_sizes_share_the_ssd() -> None:
    rig = Rig(32, 32)
    rig.open()
    small = rig.ns
    large = rig.core.open_namespace(CacheSpec.raw("large", block_bytes=3 * BLOCK)).id
    for turn in range(8):
        rig.ns, rig.block_bytes = small, BLOCK
        rig.put(chain(f"small {turn}", 5))
        rig.ns, rig.block_bytes = large, 3 * BLOCK
        keys = chain(f"large {turn}", 3)
        rig.put(keys)
        rig.settle()
        rig.check()
        assert rig.get(keys) == (3, EndReason.COMPLETE)
        rig.apply(rig.core.evict(Tier.DRAM, b"", 0, False, 0.0)[0])
        assert rig.get(keys)[0] == len(rig.directory.match(b"".join(keys)))
    rig.settle()
    rig.check()


def test_I7_full_table_forgets_the_oldest_blocks_on_ssd() -> None:
    rig = Rig(4, 32, blocks_max=8)
    rig.open()
    for name in range(4):
        keys = chain(f"row {name}", 4)
        request = rig.reserve(keys, timeout_s=9.0)
        rig.settle()
        assert rig.reserved(request).statuses == bytes([SLOT] * 4)
        rig.fill(request, keys)
        rig.commit(request, keys, [0, 1, 2, 3])
        rig.settle()
        rig.check()
    assert len(rig.disk.index) == 8
