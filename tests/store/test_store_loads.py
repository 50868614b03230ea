"""NodeCore with an SSD tier: loads for acquires and prefetches."""

from kvstore.core.effects import End, Granted, Prefetched
from kvstore.core.ssd_record import SsdRecord
from kvstore.core.types import EndReason, ReserveStatus, Tier
from kvstore.errors import ResourceExhaustedError

from tests.store.rig import Rig, chain

A, B = chain("a", 16), chain("b", 16)
SLOT, HAVE = ReserveStatus.SLOT, ReserveStatus.HAVE


def test_blocks_come_back_from_ssd_in_chain_order(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:8])
    assert tiers.directory.match(b"".join(A[:8])).tolist() == [Tier.SSD] * 8
    request = tiers.acquire(A[:8], timeout_s=5.0)
    assert len(tiers.disk.reads) == 8
    assert (1, request) not in tiers.answers
    for op in tiers.disk.reads[1:4]:
        tiers.end_read(op)
    assert (1, request) not in tiers.answers
    tiers.end_read(tiers.disk.reads[0])
    (granted,) = tiers.answers[1, request]
    assert isinstance(granted, Granted)
    assert [(run.first, run.count, run.source) for run in granted.runs] == [(0, 4, Tier.SSD)]
    tiers.settle()
    assert tiers.end(request) == End(8, EndReason.COMPLETE)
    tiers.check_bytes(request, A)
    tiers.release(request)
    assert tiers.directory.match(b"".join(A[:8])).tolist() == [Tier.DRAM] * 8


def test_acquire_without_time_takes_what_dram_has(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    tiers.get(A[:2])
    request = tiers.acquire(A[:4])
    assert tiers.end(request) == End(2, EndReason.TIMED_OUT)
    assert not tiers.disk.reads
    tiers.release(request)


def test_reads_in_flight_have_a_limit_and_the_oldest_lease_goes_first() -> None:
    rig = Rig(7, 64, reads_in_flight_max=2)  # DRAM for one of them only
    rig.open()
    rig.put_on_ssd_only(A[:4])
    rig.put_on_ssd_only(B[:4])
    first = rig.acquire(A[:4], timeout_s=5.0)
    second = rig.acquire(B[:4], timeout_s=5.0)
    assert [op.key for op in rig.disk.reads] == A[:2]
    rig.end_read(rig.disk.reads[0])
    rig.end_read(rig.disk.reads[0])
    assert [op.key for op in rig.disk.reads] == A[2:4]
    rig.settle()
    assert rig.end(first) == End(4, EndReason.COMPLETE)
    rig.release(first)
    rig.settle()
    assert rig.end(second) == End(4, EndReason.COMPLETE)
    rig.check()


def test_two_acquires_share_a_load(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    requests = [tiers.acquire(A[:4], timeout_s=5.0) for _ in range(3)]
    assert len(tiers.disk.reads) == 4
    tiers.release(requests[1])
    assert tiers.end(requests[1]) == End(0, EndReason.RELEASED)
    tiers.settle()
    assert tiers.end(requests[0]) == tiers.end(requests[2]) == End(4, EndReason.COMPLETE)
    tiers.release(requests[0])
    tiers.release(requests[2])


def test_I1_corrupt_block_is_a_miss_and_is_dropped(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    at = SsdRecord.decode(A[2], tiers.disk.index[A[2]]).ssd_offset
    tiers.disk.data[at + 5] ^= 1
    request = tiers.acquire(A[:4], timeout_s=5.0)
    tiers.settle()
    assert tiers.end(request) == End(2, EndReason.CORRUPT)
    assert tiers.core.counters["corrupt_blocks"] == 1
    assert A[2] not in tiers.disk.index
    tiers.release(request)
    assert tiers.get(A[:4]) == (2, EndReason.CORRUPT)
    assert tiers.put(A[:4]) == bytes([HAVE, HAVE, SLOT, HAVE])
    tiers.settle()
    assert tiers.get(A[:4]) == (4, EndReason.COMPLETE)


def test_failed_read_is_counted_and_a_miss(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:2])
    request = tiers.acquire(A[:2], timeout_s=5.0)
    tiers.end_read(tiers.disk.reads[1], fail=True)
    tiers.settle()
    assert tiers.end(request) == End(1, EndReason.CORRUPT)
    assert tiers.core.counters["ssd_read_errors"] == 1
    tiers.release(request)


def test_acquire_ends_at_its_deadline(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:3])
    request = tiers.acquire(A[:3], timeout_s=2.0)
    tiers.end_read(tiers.disk.reads[0])
    assert tiers.core.next_deadline() == 2.0
    tiers.tick(2.0)
    assert tiers.end(request) == End(1, EndReason.TIMED_OUT)
    tiers.settle()
    tiers.release(request)
    assert tiers.get(A[:3]) == (3, EndReason.COMPLETE)


def test_acquire_larger_than_dram_ends_for_want_of_space(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:12])
    request = tiers.acquire(A[:12], timeout_s=5.0)
    while tiers.disk.pending:
        tiers.disk_step()
    assert tiers.end(request) == End(8, EndReason.NO_SPACE)
    tiers.check_bytes(request, A)
    tiers.release(request)


def test_load_waits_for_space_until_its_deadline(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    tiers.put(B[:4])
    tiers.put(B[4:8], parent=B[3])
    tiers.settle()
    lease = tiers.acquire(B[:8])
    starved = tiers.acquire(A[:4], timeout_s=2.0)
    served = tiers.acquire(A[:4], timeout_s=9.0)
    assert not tiers.disk.reads
    tiers.tick(2.0)
    assert tiers.end(starved) == End(0, EndReason.NO_SPACE)
    tiers.release(lease, 4, 4)
    tiers.settle()
    assert tiers.end(served) == End(4, EndReason.COMPLETE)
    tiers.release(lease)
    tiers.release(served)


def test_releasing_a_running_acquire_cancels_the_rest(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    request = tiers.acquire(A[:4], timeout_s=9.0)
    tiers.end_read(tiers.disk.reads[0])
    tiers.release(request, 0, 1)
    assert tiers.end(request) is None
    tiers.end_read(tiers.disk.reads[0])
    tiers.release(request, 1, 3)
    assert tiers.end(request) == End(2, EndReason.RELEASED)
    tiers.settle()
    assert tiers.core.pinned_blocks() == 0


def test_prefetch_loads_without_pinning(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:4])
    request = tiers.next_id()
    tiers.apply(tiers.core.prefetch(1, request, tiers.ns, b"".join(A[:6]), b"", 0.0))
    assert tiers.answers[1, request] == [Prefetched(4)]
    assert tiers.core.pinned_blocks() == 0
    tiers.settle()
    assert tiers.end(tiers.acquire(A[:4])) == End(4, EndReason.COMPLETE)


def test_prefetch_waits_for_space(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:2])
    tiers.put(B[:8])
    tiers.settle()
    lease = tiers.acquire(B[:8])
    tiers.apply(tiers.core.prefetch(1, 99, tiers.ns, A[0], b"", 0.0))
    assert not tiers.disk.reads
    assert not tiers.core.idle()
    tiers.release(lease)
    assert len(tiers.disk.reads) == 1
    tiers.settle()


def test_quarantined_client_hears_no_more_of_its_loads(tiers: Rig) -> None:
    tiers.put_on_ssd_only(A[:3])
    waiting = tiers.acquire(A[:3], timeout_s=9.0)
    tiers.end_read(tiers.disk.reads[0])
    tiers.apply(tiers.core.session_quarantined(1, 0.0))
    assert tiers.end(waiting) == End(1, EndReason.RELEASED)
    assert tiers.core.pinned_blocks() == 1
    tiers.settle()
    tiers.apply(tiers.core.session_settled(1, 0.0))
    assert tiers.core.pinned_blocks() == 0


def test_acquires_and_loads_beyond_the_waiting_limit_are_refused() -> None:
    rig = Rig(8, 32, waiting_max=1)
    rig.open()
    rig.put_on_ssd_only(A[:2])
    rig.acquire(A[:2], timeout_s=5.0)
    assert isinstance(rig.failure(rig.acquire(A[:2], timeout_s=5.0)), ResourceExhaustedError)
    rig.settle()
