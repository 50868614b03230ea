"""Loads run ahead along a chain: their order, their bounds, and who comes first."""

import pytest
from kvstore.core.acquire import Acquires
from kvstore.core.effects import End, Granted, Prefetched, ReadSsd
from kvstore.core.leases import Lease
from kvstore.core.types import EndReason, ReserveStatus

from tests.store.rig import Rig, chain, shuffled

A, B, C = chain("a", 40), chain("b", 40), chain("c", 8)


def rig_with(dram_blocks: int, reads: int, *chains: list[bytes]) -> Rig:
    """Chains that are on SSD only."""
    rig = Rig(dram_blocks, 256, reads_in_flight_max=reads)
    rig.open()
    for keys in chains:
        rig.put_on_ssd_only(keys)
    return rig


def prefetch(rig: Rig, keys: list[bytes]) -> int:
    request = rig.next_id()
    rig.apply(rig.core.prefetch(1, request, rig.ns, b"".join(keys), b"", rig.now))
    (answer,) = rig.answers[1, request]
    assert isinstance(answer, Prefetched)
    return answer.started


def end_reads(rig: Rig, reads_max: int) -> list[ReadSsd]:
    """Ends reads one by one, the oldest first; all in the order in which they were started."""
    seen: list[ReadSsd] = []
    while rig.disk.reads:
        assert len(rig.disk.reads) <= reads_max
        seen += [op for op in rig.disk.reads if op not in seen]
        rig.end_read(rig.disk.reads[0])
    return seen


def test_a_long_prompt_streams_in_chain_order_while_its_first_blocks_are_used() -> None:
    rig = rig_with(48, 4, A)
    request = rig.acquire(A, timeout_s=9.0)
    assert [op.key for op in rig.disk.reads] == A[:4]
    rig.end_read(rig.disk.reads[0])
    assert rig.granted(request).keys() == {0}, "the first is usable while the next are read"
    rig.check_bytes(request, A)
    rig.release(request, 0, 1)
    assert [op.key for op in rig.disk.reads] == A[1:5]
    assert [op.key for op in end_reads(rig, 4)] == A[1:]
    assert rig.end(request) == End(40, EndReason.COMPLETE)
    rig.check()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_order_reads_end_in_grants_come_in_chain_order(seed: int) -> None:
    rig = rig_with(48, 8, A)
    request = rig.acquire(A, timeout_s=9.0)
    pick = shuffled(seed)
    while rig.disk.reads:
        assert len(rig.disk.reads) <= 8
        rig.end_read(rig.disk.reads[pick(len(rig.disk.reads))])
    bodies = [body for body in rig.answers[1, request] if isinstance(body, Granted)]
    indices = [run.first + i for body in bodies for run in body.runs for i in range(run.count)]
    assert indices == list(range(40))
    assert len(bodies) > 1, "in runs as they come, not in one at the end"
    rig.check_bytes(request, A)
    rig.release(request)
    rig.check()


@pytest.mark.parametrize("seed", range(3))
def test_the_first_blocks_of_a_long_prompt_are_granted_while_later_ones_are_read(seed: int) -> None:
    """The device ends each read before any that was started after its end, as a real one does.

    So all that has ended is a beginning of the chain whenever the reads of one moment have ended,
    and as at most 8 are out, no grant can have more than 8 blocks.
    """
    rig = rig_with(48, 8, A)
    request = rig.acquire(A, timeout_s=9.0)
    pick = shuffled(seed)
    ended = 0
    while together := list(rig.disk.reads):
        assert len(together) <= 8
        ended += len(together)
        while together:
            rig.end_read(together.pop(pick(len(together))))
        assert rig.granted(request).keys() == set(range(ended)), "all of it is usable"
        assert rig.disk.reads or ended == len(A), "and more is being read"
    grants = [body for body in rig.answers[1, request] if isinstance(body, Granted)]
    assert max(sum(run.count for run in grant.runs) for grant in grants) <= 8
    assert len(grants) >= len(A) // 8
    rig.check_bytes(request, A)
    rig.release(request)
    rig.check()


def test_the_first_prompt_has_most_of_the_reads_and_a_second_is_not_starved() -> None:
    rig = rig_with(96, 8, A, B)
    first = rig.acquire(A, timeout_s=9.0)
    assert len(rig.disk.reads) == 8
    second = rig.acquire(B, timeout_s=9.0)
    started = []
    for _ in range(24):
        started += [op for op in rig.disk.reads if op not in started]
        rig.end_read(rig.disk.reads[0])
    assert rig.granted(second).keys() >= {0, 1}, "it has its first blocks before the first is done"
    assert rig.end(first) is None
    of_first = sum(op.key in A for op in started)
    assert of_first >= 3 * (len(started) - of_first)
    end_reads(rig, 8)
    assert rig.end(first) == rig.end(second) == End(40, EndReason.COMPLETE)
    rig.release(first)
    rig.release(second)
    rig.check()


def test_what_the_first_prompt_does_not_need_goes_to_the_next() -> None:
    rig = rig_with(96, 8, A, C)
    rig.acquire(C[:2], timeout_s=9.0)
    rig.acquire(A, timeout_s=9.0)
    assert [op.key for op in rig.disk.reads] == C[:2] + A[:6]
    rig.settle()


def test_many_prompts_each_get_a_read_as_far_as_there_are_some() -> None:
    rig = Rig(64, 256, reads_in_flight_max=4)
    rig.open()
    chains = [chain(f"{n}", 8) for n in range(4)]
    for keys in chains:
        rig.put_on_ssd_only(keys)
    requests = [rig.acquire(keys, timeout_s=9.0) for keys in chains]
    for _ in range(4):
        rig.end_read(rig.disk.reads[0])
    assert [op.key for op in rig.disk.reads].count(chains[1][0]) == 1
    rig.settle()
    assert [rig.end(request) for request in requests] == [End(8, EndReason.COMPLETE)] * 4


def test_two_prompts_that_dram_cannot_hold_together_never_wait_for_each_other() -> None:
    rig = rig_with(8, 8, A[:6], B[:6])
    first = rig.acquire(A[:6], timeout_s=9.0)
    second = rig.acquire(B[:6], timeout_s=9.0)
    end_reads(rig, 8)
    assert rig.end(first) == End(6, EndReason.COMPLETE)
    assert rig.end(second) is None
    rig.release(first)
    end_reads(rig, 8)
    assert rig.end(second) == End(6, EndReason.COMPLETE)
    rig.release(second)
    rig.check()


def test_prefetches_are_read_in_chain_order_within_the_bound() -> None:
    rig = rig_with(96, 4, A[:12], B[:4])
    assert prefetch(rig, A[:12]) == 12
    assert prefetch(rig, B[:4]) == 4
    assert [op.key for op in end_reads(rig, 4)] == A[:12] + B[:4]
    assert rig.core.pinned_blocks() == 0
    assert rig.core.idle()


def test_what_somebody_waits_for_is_read_before_prefetches() -> None:
    rig = rig_with(96, 4, A, B[:4])
    prefetch(rig, A)
    request = rig.acquire(B[:4], timeout_s=9.0)
    assert [op.key for op in rig.disk.reads] == A[:4]
    for _ in range(4):
        rig.end_read(rig.disk.reads[0])
    assert [op.key for op in rig.disk.reads] == B[:4]
    rig.settle()
    assert rig.end(request) == End(4, EndReason.COMPLETE)


def test_a_prefetch_does_not_push_out_what_it_has_read() -> None:
    rig = rig_with(8, 4, A)
    assert prefetch(rig, A) == 4
    rig.settle()
    assert rig.core.counters["ssd_read_blocks"] == 4
    assert rig.end(rig.acquire(A[:8])) == End(4, EndReason.TIMED_OUT)
    rig.check()


def test_a_prefetch_and_an_acquire_of_the_same_blocks_share_their_reads() -> None:
    rig = rig_with(96, 4, A[:8])
    prefetch(rig, A[:8])
    request = rig.acquire(A[:8], timeout_s=9.0)
    assert len(end_reads(rig, 4)) == 8
    assert rig.end(request) == End(8, EndReason.COMPLETE)
    assert rig.core.idle()


def test_a_report_costs_what_it_starts_however_many_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts that wait for reads which are out, or were never in need of one, are not asked."""
    calls = 0
    read_ahead = Acquires._read_ahead

    def counted(acquires: Acquires, lease: Lease, count: int) -> bool:
        nonlocal calls
        calls += 1
        return read_ahead(acquires, lease, count)

    monkeypatch.setattr(Acquires, "_read_ahead", counted)
    rig = rig_with(96, 64, A, B, C)
    requests = [rig.acquire(keys, timeout_s=9.0) for _ in range(50) for keys in (C, A)]
    requests += [rig.acquire(B, timeout_s=9.0)]
    reports = len(end_reads(rig, 64))
    ends = [rig.end(request) for request in requests]
    assert {end.reason for end in ends if end} == {EndReason.COMPLETE}
    assert None not in ends
    assert reports == len(A) + len(B) + len(C)
    assert calls <= 3 * reports + 2 * len(requests)
    for request in requests:
        rig.release(request)
    rig.check()


def test_a_prompt_whose_tail_takes_the_space_for_its_first_block_ends_earlier() -> None:
    rig = rig_with(4, 8, A[:5])
    rig.get(A[1:5])
    request = rig.acquire(A[:5], timeout_s=9.0)
    rig.settle()
    assert rig.end(request) == End(4, EndReason.NO_SPACE), "the last one gives way to the first"
    rig.check_bytes(request, A)
    rig.release(request)
    rig.check()


def test_room_is_not_made_for_a_block_by_dropping_the_copy_that_is_read() -> None:
    """A parent that never got to SSD may leave DRAM only with what is behind it on SSD."""
    rig = Rig(2, 8)
    rig.open()
    parent, child = chain("a", 2)
    rig.put([parent, child])
    rig.end_writes([op for op in rig.disk.writes if op.key == child])
    while rig.disk.writes:
        rig.end_writes(rig.disk.writes[:], fail=True)
    reserved = rig.reserve(chain("b", 1))
    assert rig.reserved(reserved).statuses == bytes([ReserveStatus.SLOT])  # the child's
    rig.apply(rig.core.prefetch(1, rig.next_id(), rig.ns, child, parent, rig.now))
    assert not (rig.disk.reads and rig.disk.drops)
    while rig.disk.pending:
        if rig.disk.reads:
            rig.end_read(rig.disk.reads[0], fail=True)
        else:
            rig.disk_step()
    rig.check()
