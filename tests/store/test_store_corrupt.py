"""I1 on every path: bytes that are not those of the commit are a miss, counted, never served."""

import numpy as np
import pytest
import xxhash
from kvstore.core.effects import End
from kvstore.core.ssd_record import SsdRecord
from kvstore.core.types import AckLevel, EndReason, IoOutcome, ReserveStatus, Tier

from tests.store.rig import BLOCK, Rig, chain, content

A, B = chain("a", 16), chain("b", 16)
SLOT, HAVE, BUSY = ReserveStatus.SLOT, ReserveStatus.HAVE, ReserveStatus.BUSY


def ssd_offset(rig: Rig, key: bytes) -> int:
    return SsdRecord.decode(key, rig.disk.index[key]).ssd_offset


def flip_on_ssd(rig: Rig, key: bytes, at: int = 5) -> None:
    rig.disk.data[ssd_offset(rig, key) + at] ^= 1


def flip_in_dram(rig: Rig, key: bytes) -> None:
    (write,) = (op for op in rig.disk.writes if op.key == key)
    rig.pool[write.dram_offset + 9] ^= 1


def prefetch(rig: Rig, keys: list[bytes]) -> None:
    request = rig.next_id()
    rig.apply(rig.core.prefetch(1, request, rig.ns, b"".join(keys), b"", rig.now))


# Before SSD: what was committed is not what is there


@pytest.mark.parametrize("level", [AckLevel.MEMORY, AckLevel.SYNCED])
def test_I1_bytes_that_are_not_those_of_the_commit_never_get_to_ssd(
    tiers: Rig, level: AckLevel
) -> None:
    reserve = tiers.reserve(A[:3])
    tiers.fill(reserve, A)
    commit = tiers.commit(reserve, A, [0, 1, 2], level=level)
    flip_in_dram(tiers, A[1])
    tiers.settle()
    assert sorted(tiers.disk.index) == sorted([A[0], A[2]])
    if level == AckLevel.SYNCED:
        assert tiers.levels(commit) == bytes([AckLevel.SYNCED, 0, AckLevel.SYNCED])
    assert tiers.core.counters["commit_corrupt_blocks"] == 1
    assert tiers.get(A[:3]) == (1, EndReason.CORRUPT)
    usage = tiers.core.usage()
    assert [(u.live_bytes, u.quarantined_bytes) for u in usage] == [(2 * BLOCK, 0)] * 2
    assert tiers.put(A[:3]) == bytes([HAVE, SLOT, HAVE])
    tiers.settle()
    assert tiers.get(A[:3]) == (3, EndReason.COMPLETE)


def test_I4_its_slot_rests_as_long_as_a_lease_is_on_it(tiers: Rig) -> None:
    tiers.put(A[:2])
    lease = tiers.acquire(A[:2])
    flip_in_dram(tiers, A[1])
    tiers.settle()
    assert tiers.core.usage()[0].quarantined_bytes == BLOCK
    assert tiers.end(tiers.acquire(A[:2])) == End(1, EndReason.CORRUPT)
    assert tiers.put(A[1:2], parent=A[0]) == bytes([BUSY])
    tiers.check()
    tiers.release(lease)
    assert tiers.core.usage()[0].quarantined_bytes == 0
    tiers.apply(tiers.core.session_settled(1, tiers.now))


def test_an_acquire_that_waits_before_it_ends_there(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:1])
    tiers.put(A[1:3], parent=A[0])
    waiting = tiers.acquire(A[:3], timeout_s=9.0)
    flip_in_dram(tiers, A[1])
    tiers.end_writes(tiers.disk.writes[:])
    assert tiers.end(waiting) is None
    tiers.settle()
    assert tiers.end(waiting) == End(1, EndReason.CORRUPT)
    tiers.release(waiting)
    assert tiers.core.usage()[0].quarantined_bytes == 0


def test_purged_while_it_is_found_out(tiers: Rig) -> None:
    tiers.put(A[:1])
    flip_in_dram(tiers, A[0])
    tiers.apply(tiers.core.purge(None, 0.0)[0])
    tiers.settle()
    assert [usage.free_bytes for usage in tiers.core.usage()] == [8 * BLOCK, 32 * BLOCK]


def test_every_shard_is_verified_before_it_is_written(tiers: Rig) -> None:
    for shard in range(2):
        reserve = tiers.reserve(A[:1], shard=(shard, 2))
        tiers.fill(reserve, A)
        data = content(A[0])[shard * BLOCK // 2 : (shard + 1) * BLOCK // 2]
        wrong = xxhash.xxh3_64_intdigest(data) ^ shard  # the second one says something else
        sums = np.array([wrong], dtype="<u8").tobytes()
        effects = tiers.core.commit(1, tiers.next_id(), reserve, [0], sums, AckLevel.MEMORY, 0.0)
        tiers.apply(effects)
    tiers.settle()
    assert not tiers.disk.index
    assert tiers.get(A[:1]) == (0, EndReason.CORRUPT)


# From SSD


def test_the_slot_of_a_corrupt_copy_rests_until_its_removal_is_durable(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:2])
    bad = ssd_offset(tiers, A[1])
    flip_on_ssd(tiers, A[1])
    request = tiers.acquire(A[:2], timeout_s=9.0)
    for op in tiers.disk.reads[:]:
        tiers.end_read(op)
    assert tiers.end(request) == End(1, EndReason.CORRUPT)
    assert tiers.core.usage()[1].quarantined_bytes == BLOCK
    tiers.put(B[:4])
    assert bad not in [op.ssd_offset for op in tiers.disk.writes]
    tiers.check()
    tiers.settle()
    assert tiers.core.usage()[1].quarantined_bytes == 0
    tiers.release(request)


def test_every_acquire_that_waits_for_it_ends_there(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    flip_on_ssd(tiers, A[2])
    requests = [tiers.acquire(A[: 2 + n], timeout_s=9.0) for n in range(3)]
    tiers.settle()
    ends = [tiers.end(request) for request in requests]
    assert ends == [End(2, EndReason.COMPLETE), *[End(2, EndReason.CORRUPT)] * 2]
    assert tiers.core.counters["corrupt_blocks"] == 1
    for request in requests:
        tiers.release(request)


def test_under_a_prefetch_it_is_dropped_before_anybody_asks(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    flip_on_ssd(tiers, A[1])
    prefetch(tiers, A[:4])
    tiers.settle()
    assert tiers.core.counters["corrupt_blocks"] == 1
    assert tiers.end(tiers.acquire(A[:4])) == End(1, EndReason.CORRUPT)
    assert A[1] not in tiers.disk.index


def test_under_a_prefetch_and_an_acquire_at_once(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    flip_on_ssd(tiers, A[0])
    prefetch(tiers, A[:4])
    request = tiers.acquire(A[:4], timeout_s=9.0)
    assert len(tiers.disk.reads) == 4
    tiers.settle()
    assert tiers.end(request) == End(0, EndReason.CORRUPT)
    assert tiers.core.counters["corrupt_blocks"] == 1


@pytest.mark.parametrize("at", [0, BLOCK // 2 - 1, BLOCK // 2, BLOCK - 1])
def test_every_shard_is_verified_after_a_read(tiers: Rig, at: int) -> None:
    for shard in range(2):
        reserve = tiers.reserve(A[:1], shard=(shard, 2))
        tiers.fill(reserve, A)
        data = content(A[0])[shard * BLOCK // 2 : (shard + 1) * BLOCK // 2]
        sums = np.array([xxhash.xxh3_64_intdigest(data)], dtype="<u8").tobytes()
        effects = tiers.core.commit(1, tiers.next_id(), reserve, [0], sums, AckLevel.MEMORY, 0.0)
        tiers.apply(effects)
    tiers.settle()
    tiers.apply(tiers.core.evict(Tier.DRAM, b"", 0, False, 0.0)[0])
    flip_on_ssd(tiers, A[0], at)
    assert tiers.get(A[:1]) == (0, EndReason.CORRUPT)
    tiers.settle()
    assert not tiers.disk.index
    assert tiers.core.usage()[0].blocks == 0


# While the scrubber looks at it


def scrubbed(rig: Rig, key: bytes) -> None:
    """The scrubber finds a copy corrupt."""
    copies, _ = rig.core.scrub_next(0, 1 << 30)
    bad = [(copy, IoOutcome.CORRUPT) for copy in copies if copy.key == key]
    assert len(bad) == 1
    rig.apply(rig.core.scrub_done(bad, rig.now))


def test_a_block_whose_copy_is_dropped_does_not_leave_dram_meanwhile() -> None:
    rig = Rig(4, 32)
    rig.open()
    rig.put(A[:4])
    rig.settle()
    scrubbed(rig, A[3])
    assert rig.put(B[:2]) == bytes([ReserveStatus.FULL] * 2), "A[3] is the last copy, and a leaf"
    rig.settle()
    assert A[3] in rig.disk.index, "written anew from DRAM"
    assert rig.put(B[:2]) == bytes([SLOT] * 2)
    rig.settle()
    assert rig.get(A[:4]) == (4, EndReason.COMPLETE)
    rig.check()


def test_an_eviction_between_the_look_and_the_verdict(tiers: Rig) -> None:
    tiers.put(A[:4])
    tiers.settle()
    copies, _ = tiers.core.scrub_next(0, 1 << 30)
    tiers.apply(tiers.core.evict(Tier.DRAM, b"", 0, False, 0.0)[0])
    bad = [(copy, IoOutcome.CORRUPT) for copy in copies if copy.key == A[1]]
    tiers.apply(tiers.core.scrub_done(bad, tiers.now))
    assert tiers.get(A[:4]) == (1, EndReason.CORRUPT)
    tiers.settle()
    assert A[1] not in tiers.disk.index


def test_a_lease_on_dram_is_not_disturbed_by_the_scrubber(tiers: Rig) -> None:
    tiers.put(A[:2])
    tiers.settle()
    lease = tiers.acquire(A[:2])
    scrubbed(tiers, A[1])
    tiers.check_bytes(lease, A)
    tiers.settle()
    assert set(tiers.disk.index) == set(A[:2])
    tiers.release(lease)


def test_both_the_scrubber_and_a_read_find_it(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:2])
    flip_on_ssd(tiers, A[1])
    copies, _ = tiers.core.scrub_next(0, 1 << 30)
    request = tiers.acquire(A[:2], timeout_s=9.0)
    verdict = [(copy, IoOutcome.CORRUPT) for copy in copies if copy.key == A[1]]
    tiers.apply(tiers.core.scrub_done(verdict, tiers.now))
    for op in tiers.disk.reads[:]:
        tiers.end_read(op)
    tiers.apply(tiers.core.scrub_done(verdict, tiers.now))
    assert len(tiers.disk.drops) == 1
    tiers.settle()
    assert tiers.end(request) == End(1, EndReason.CORRUPT)
    tiers.release(request)
