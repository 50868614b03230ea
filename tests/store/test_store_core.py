"""NodeCore without an SSD tier: requests, leases, reservations, limits."""

import numpy as np
import pytest
from kvstore.core.effects import Aborted, Committed, End, Granted, Matched
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel, EndReason, ReserveStatus, SlotRun, Tier
from kvstore.errors import (
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
)

from tests.store.rig import BLOCK, Rig, chain, content

A, B = chain("a", 16), chain("b", 16)
SLOT, HAVE, FULL, BUSY = (
    ReserveStatus.SLOT,
    ReserveStatus.HAVE,
    ReserveStatus.FULL,
    ReserveStatus.BUSY,
)


def test_stored_blocks_are_granted_in_one_run(dram: Rig) -> None:
    assert dram.put(A[:4]) == bytes([SLOT] * 4)
    request = dram.acquire(A[:6])
    granted, end = dram.answers[1, request]
    assert isinstance(granted, Granted)
    assert granted.runs == [SlotRun(0, 4, granted.runs[0].offset, BLOCK, Tier.DRAM)]
    assert end == End(4, EndReason.NEVER_STORED)
    offsets = np.array(list(dram.granted(request).values()))
    assert granted.generations == dram.directory.generations_at(offsets).tobytes()
    dram.check_bytes(request, A)
    assert dram.core.pinned_blocks() == 4
    dram.release(request)
    assert dram.core.pinned_blocks() == 0


def test_acquire_of_nothing_and_of_everything(dram: Rig) -> None:
    dram.put(A[:3])
    assert dram.end(dram.acquire([])) == End(0, EndReason.COMPLETE)
    assert dram.end(dram.acquire(B)) == End(0, EndReason.NEVER_STORED)
    request = dram.acquire(A[:3])
    assert dram.end(request) == End(3, EndReason.COMPLETE)
    dram.release(request)


def test_I2_reserved_blocks_are_invisible_until_they_are_committed(dram: Rig) -> None:
    reserve = dram.reserve(A[:4])
    assert dram.get(A[:4]) == (0, EndReason.NEVER_STORED)
    assert not len(dram.directory.match(A[0]))
    dram.fill(reserve, A)
    dram.commit(reserve, A, [0, 1])
    assert dram.get(A[:4]) == (2, EndReason.NEVER_STORED)
    assert len(dram.directory.match(b"".join(A[:4]))) == 2
    dram.apply(dram.core.session_settled(1, 0.0))
    dram.check()
    assert dram.core.usage()[0].pending_bytes == 0


def test_what_is_stored_or_being_filled_gets_no_second_slot(dram: Rig) -> None:
    dram.open(2)
    dram.put(A[:2])
    dram.reserve(A[:4])
    assert dram.put(A[:5], session=2) == bytes([HAVE, HAVE, BUSY, BUSY, SLOT])


def test_full_when_everything_is_pinned(dram: Rig) -> None:
    dram.put(A)
    request = dram.acquire(A)
    assert dram.put(B[:2]) == bytes([FULL, FULL])
    assert dram.core.counters["refused_full_blocks"] == 2
    dram.release(request, 14, 2)
    assert dram.put(B[:3]) == bytes([SLOT, SLOT, FULL])
    assert all(dram.pool[at : at + 32] == A[i] for i, at in dram.granted(request).items() if i < 14)
    dram.release(request)


def test_I4_slot_is_not_reused_under_a_lease(dram: Rig) -> None:
    dram.put(A[:8])
    request = dram.acquire(A[:8])
    for name in range(6):
        dram.put(chain(f"other {name}", 4))
        dram.check_bytes(request, A)
        dram.check()
    dram.release(request)
    dram.put(chain("last", 8))
    assert dram.get(A[:8]) == (0, EndReason.EVICTED)


def test_deepest_blocks_of_the_oldest_chain_go_first(dram: Rig) -> None:
    dram.put(A[:8])
    dram.put(B[:8])
    dram.get(A[:8])
    dram.put(chain("c", 3))
    assert dram.get(B) == (5, EndReason.EVICTED)
    assert dram.get(A[:8]) == (8, EndReason.COMPLETE)


def test_a_block_stays_as_long_as_its_child(dram: Rig) -> None:
    dram.put(A[:15])
    request = dram.acquire([A[14]])
    assert dram.end(request) == End(1, EndReason.COMPLETE)
    assert dram.put(B[:3]) == bytes([SLOT, FULL, FULL])
    dram.release(request)


def test_reserve_waits_for_space_and_then_gets_it(dram: Rig) -> None:
    dram.put(A)
    lease = dram.acquire(A)
    first = dram.reserve(B[:3], timeout_s=5.0)
    second = dram.reserve(chain("c", 2), timeout_s=5.0)
    assert dram.core.next_deadline() == 5.0
    assert (1, first) not in dram.answers
    dram.release(lease, 13, 3)
    assert dram.reserved(first).statuses == bytes([SLOT] * 3)
    assert (1, second) not in dram.answers
    assert not dram.core.idle()
    dram.tick(5.0)
    assert dram.reserved(second).statuses == bytes([FULL] * 2)
    assert dram.core.next_deadline() is None
    dram.release(lease)


def test_reserve_larger_than_the_pool_gets_what_there_is(dram: Rig) -> None:
    request = dram.reserve(chain("long", 40), timeout_s=60.0)
    assert dram.reserved(request).statuses == bytes([SLOT] * 16 + [FULL] * 24)


def test_abort_gives_slots_back(dram: Rig) -> None:
    reserve = dram.reserve(A[:4])
    dram.fill(reserve, A)
    dram.commit(reserve, A, [0])
    for expected, indices in ((1, [2]), (2, []), (0, [])):
        request = dram.next_id()
        dram.apply(dram.core.abort(1, request, reserve, indices, 0.0))
        assert dram.answers[1, request] == [Aborted(expected)]
    assert dram.get(A[:4]) == (1, EndReason.NEVER_STORED)
    assert dram.core.usage()[0].live_bytes == BLOCK


def test_abort_ends_a_reserve_that_waits(dram: Rig) -> None:
    dram.put(A[:14])
    lease = dram.acquire(A[:14])
    waiting = dram.reserve(B[:4], timeout_s=5.0)
    commit = dram.commit(waiting, B, [0])
    assert isinstance(dram.failure(commit), PreconditionError)
    request = dram.next_id()
    dram.apply(dram.core.abort(1, request, waiting, [], 0.0))
    assert dram.reserved(waiting).statuses == bytes([FULL] * 4)
    assert dram.core.usage()[0].free_bytes == 2 * BLOCK
    dram.release(lease)


def test_commit_twice_or_of_nothing_fails(dram: Rig) -> None:
    dram.put(A[:1])
    reserve = dram.reserve(A[:3])
    dram.fill(reserve, A)
    first = dram.commit(reserve, A, [1])
    again = dram.commit(reserve, A, [2, 1, 0])
    assert dram.levels(first) == bytes([AckLevel.MEMORY])
    assert dram.levels(again) == bytes([AckLevel.MEMORY, 0, 0])
    assert isinstance(dram.failure(dram.commit(reserve, A, [1])), NotFoundError)


def test_without_ssd_the_level_reached_is_memory(dram: Rig) -> None:
    reserve = dram.reserve(A[:1])
    dram.fill(reserve, A)
    commit = dram.commit(reserve, A, [0], level=AckLevel.SYNCED)
    assert dram.answers[1, commit] == [Committed(bytes([AckLevel.MEMORY]))]


def test_I6_settled_session_gives_everything_back(dram: Rig) -> None:
    dram.put(A[:4])
    dram.acquire(A[:4])
    dram.reserve(B[:4])
    dram.reserve(chain("long", 40), timeout_s=9.0)
    dram.apply(dram.core.session_settled(1, 0.0))
    usage = dram.core.usage()[0]
    assert (usage.live_bytes, usage.pending_bytes) == (4 * BLOCK, 0)
    assert dram.core.pinned_blocks() == 0
    assert dram.core.idle()
    dram.apply(dram.core.session_settled(1, 0.0))


def test_I4_lost_client_keeps_its_slots_until_it_is_settled(dram: Rig) -> None:
    dram.open(2)
    dram.put(A[:4])
    lease = dram.acquire(A[:4])
    reserve = dram.reserve(B[:4])
    dram.reserve(chain("long", 40), timeout_s=9.0)
    dram.apply(dram.core.session_quarantined(1, 0.0))
    assert dram.core.sessions() == 1
    usage = dram.core.usage()[0]
    assert (usage.quarantined_bytes, usage.pending_bytes) == (4 * BLOCK, 0)
    assert dram.put(B[:2], session=2) == bytes([BUSY, BUSY])
    assert dram.put(chain("c", 16), session=2) == bytes([SLOT] * 8 + [FULL] * 8)
    dram.fill(reserve, B)  # the client copies on, as nobody told it
    dram.check_bytes(lease, A)
    assert dram.get(chain("c", 8), session=2) == (8, EndReason.COMPLETE)
    assert isinstance(dram.failure(dram.commit(reserve, B, [0])), PreconditionError)
    dram.check()
    dram.apply(dram.core.session_settled(1, 1.0))
    assert dram.core.usage()[0].quarantined_bytes == 0
    assert dram.put(B[:2], session=2) == bytes([SLOT, SLOT])


def test_late_reader_sees_another_generation(dram: Rig) -> None:
    dram.put(A[:16])
    request = dram.acquire(A)
    offsets = np.array(list(dram.granted(request).values()))
    before = dram.directory.generations_at(offsets)
    dram.apply(dram.core.session_settled(1, 0.0))
    dram.open(2)
    dram.put(B, session=2)
    assert (dram.directory.generations_at(offsets) != before).all()


def test_release_in_parts_and_of_nothing(dram: Rig) -> None:
    dram.put(A[:6])
    request = dram.acquire(A[:6])
    dram.release(request, 0, 2)
    dram.release(request, 1, 2)
    assert dram.core.pinned_blocks() == 3
    dram.release(request, 3)
    assert dram.core.pinned_blocks() == 0
    dram.release(request)
    assert dram.core.counters["releases_of_nothing"] == 1
    dram.release(request, -1, 5)


def test_same_key_twice_is_pinned_twice(dram: Rig) -> None:
    dram.put(A[:1])
    request = dram.acquire([A[0], A[0]])
    assert dram.end(request) == End(2, EndReason.COMPLETE)
    dram.release(request, 0, 1)
    assert dram.core.pinned_blocks() == 1
    dram.check()
    dram.release(request, 1, 1)


def test_match_tells_the_tier(dram: Rig) -> None:
    dram.put(A[:2])
    request = dram.next_id()
    dram.apply(dram.core.match(1, request, dram.ns, b"".join(A[:4])))
    assert dram.answers[1, request] == [Matched(bytes([Tier.DRAM] * 2))]


def test_children_stored_before_their_parent_find_it_later(dram: Rig) -> None:
    dram.put(A[4:8], parent=A[3])
    dram.check()
    dram.put(A[:4])
    dram.put(B[:9])  # one block has to go: the deepest of A, although A[:4] came last
    assert dram.get(A) == (7, EndReason.EVICTED)


def test_lying_parents_close_no_ring(dram: Rig) -> None:
    dram.put([A[0]], parent=A[1])
    dram.put([A[1]], parent=A[0])
    dram.put([A[2]], parent=A[2])
    dram.put(B)
    dram.put(chain("c", 16))
    assert dram.get(B) == (0, EndReason.EVICTED)


def test_purge_forgets_a_namespace_and_held_slots_follow(dram: Rig) -> None:
    other = dram.core.open_namespace(CacheSpec.raw("other", block_bytes=BLOCK))
    dram.put(A[:4])
    lease = dram.acquire(A[:2])
    home, dram.ns = dram.ns, other.id
    dram.put(B[:3])
    dram.ns = home
    effects, removal = dram.core.purge(dram.namespace.root, 0.0)
    dram.apply(effects)
    assert (removal.blocks, removal.bytes, removal.pinned) == (4, 4 * BLOCK, 2)
    assert dram.get(A[:4]) == (0, EndReason.PURGED)
    assert dram.core.usage()[0].quarantined_bytes == 2 * BLOCK
    assert dram.put(A[:4]) == bytes([BUSY, BUSY, SLOT, SLOT])
    dram.check()
    dram.release(lease)
    assert dram.put(A[:4]) == bytes([SLOT, SLOT, HAVE, HAVE])
    effects, removal = dram.core.purge(None, 0.0)
    dram.apply(effects)
    assert removal.blocks == 7
    assert dram.core.usage()[0].free_bytes == 16 * BLOCK


def test_I10_another_namespace_does_not_reach_a_block(dram: Rig) -> None:
    dram.put(A[:3])
    dram.ns = dram.core.open_namespace(CacheSpec.raw("other", block_bytes=BLOCK)).id
    assert dram.get(A[:3])[0] == 0
    assert dram.put(A[:3]) == bytes([BUSY] * 3)
    assert dram.put(B[:2], parent=A[2]) == bytes([SLOT, SLOT])


def test_blocks_of_several_sizes_share_the_pool() -> None:
    rig = Rig(64)
    rig.open()
    sizes = {
        n: rig.core.open_namespace(CacheSpec.raw(str(n), block_bytes=n))
        for n in (100, BLOCK, 3 * BLOCK, 10 * BLOCK - 1)
    }
    for turn in range(12):
        for nbytes, namespace in sizes.items():
            rig.ns, rig.block_bytes = namespace.id, nbytes
            keys = chain(f"{turn} {nbytes}", 5)
            assert rig.put(keys)[0] == SLOT
            rig.check()
            assert rig.get(keys)[0] >= 1


def test_evict_takes_leaves_and_spares_pinned(dram: Rig) -> None:
    dram.put(A[:6])
    dram.put(B[:4])
    lease = dram.acquire(B[:2])
    effects, removal = dram.core.evict(Tier.DRAM, b"", 0, False, 0.0)
    assert removal == (0, 0, 2, 0), "without drop no last copy goes"
    dram.apply(effects)
    effects, removal = dram.core.evict(Tier.DRAM, b"".join(A[2:4]), 0, True, 0.0)
    assert removal.blocks == 0, "blocks behind them are still here"
    effects, removal = dram.core.evict(Tier.DRAM, b"".join(A[4:]), 0, True, 0.0)
    dram.apply(effects)
    assert removal == (2, 2 * BLOCK, 0, 0)
    effects, removal = dram.core.evict(Tier.DRAM, b"", BLOCK + 1, True, 0.0)
    dram.apply(effects)
    assert removal.blocks == 2
    effects, removal = dram.core.evict(Tier.DRAM, b"", 0, True, 0.0)
    dram.apply(effects)
    assert (removal.blocks, removal.pinned) == (4, 2)
    assert dram.core.evict(Tier.SSD, b"", 0, True, 0.0)[1].blocks == 0
    with pytest.raises(InvalidArgumentError, match="REMOTE"):
        dram.core.evict(Tier.REMOTE, b"", 0, True, 0.0)
    dram.release(lease)


def test_tier_without_room_for_a_waiting_reserve_of_another_session(dram: Rig) -> None:
    dram.open(2)
    held = dram.reserve(A)
    waiting = dram.reserve(B[:2], session=2, timeout_s=3.0)
    dram.fill(held, A)
    dram.commit(held, A, list(range(16)))
    assert dram.reserved(waiting, 2).statuses == bytes([SLOT, SLOT])
    assert dram.pool[0:32] == content(A[0])[:32]
