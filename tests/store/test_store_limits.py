"""NodeCore: bad requests and limits."""

import pytest
from kvstore.core.spec import CacheSpec
from kvstore.core.types import AckLevel, EndReason, ReserveStatus
from kvstore.errors import (
    ConfigError,
    InvalidArgumentError,
    NotFoundError,
    PreconditionError,
    ResourceExhaustedError,
)

from tests.store.rig import BLOCK, Rig, chain

A, B = chain("a", 16), chain("b", 16)
SLOT, FULL = ReserveStatus.SLOT, ReserveStatus.FULL


def test_bad_requests_are_answered_and_change_nothing(dram: Rig) -> None:
    core, root = dram.core, dram.namespace.root
    cases = [
        (core.acquire(1, 900, 77, A[0], b"", 0.0, 0.0), NotFoundError),
        (core.acquire(9, 900, dram.ns, A[0], b"", 0.0, 0.0), PreconditionError),
        (core.acquire(1, 900, dram.ns, A[0][:31], b"", 0.0, 0.0), InvalidArgumentError),
        (core.acquire(1, 900, dram.ns, A[0], b"short", 0.0, 0.0), InvalidArgumentError),
        (core.acquire(1, 900, dram.ns, root, b"", 0.0, 0.0), InvalidArgumentError),
        (core.reserve(1, 900, dram.ns, A[0] * 2, b"", 0.0, 0.0), InvalidArgumentError),
        (core.reserve(1, 900, dram.ns, bytes(32), b"", 0.0, 0.0), InvalidArgumentError),
        (
            core.reserve(1, 900, dram.ns, A[0], b"", 0.0, 0.0, shard_index=2, num_shards=2),
            InvalidArgumentError,
        ),
        (core.commit(1, 900, 5, [0], bytes(8), AckLevel.MEMORY, 0.0), NotFoundError),
        (core.match(1, 900, 77, A[0]), NotFoundError),
    ]
    for effects, error in cases:
        assert len(effects.replies) == 1
        assert isinstance(effects.replies[0].body.error, error)  # type: ignore[union-attr]
    reserve = dram.reserve(A[:2])
    for indices, sums in (([0], bytes(7)), ([2], bytes(8)), ([-1], bytes(8)), ([0, 0], bytes(16))):
        request = dram.next_id()
        dram.apply(core.commit(1, request, reserve, indices, sums, AckLevel.MEMORY, 0.0))
        assert isinstance(dram.failure(request), InvalidArgumentError)
    lease = dram.acquire(A[:1], timeout_s=1.0)
    del lease
    dram.put(B[:1])
    dram.apply(core.acquire(1, 700, dram.ns, B[0], b"", 0.0, 0.0))
    dram.apply(core.acquire(1, 700, dram.ns, B[0], b"", 0.0, 0.0))
    assert isinstance(dram.failure(700), InvalidArgumentError)
    dram.apply(core.reserve(1, reserve, dram.ns, B[1], b"", 0.0, 0.0))
    assert isinstance(dram.failure(reserve), InvalidArgumentError)


def test_I7_limits_are_refused_clearly() -> None:
    rig = Rig(
        8,
        8,
        keys_per_request_max=4,
        holds_per_session_max=2,
        sessions_max=2,
        namespaces_max=2,
        waiting_max=1,
    )
    rig.open(1)
    rig.open(2)
    with pytest.raises(ResourceExhaustedError, match="sessions"):
        rig.open(3)
    with pytest.raises(PreconditionError, match="open already"):
        rig.open(2)
    rig.core.open_namespace(rig.spec, session_id=1)
    rig.core.open_namespace(CacheSpec.raw("second", block_bytes=10), session_id=2)
    with pytest.raises(ResourceExhaustedError, match="2 namespaces"):
        rig.core.open_namespace(CacheSpec.raw("third", block_bytes=10))
    assert isinstance(rig.failure(rig.acquire(A[:5])), InvalidArgumentError)
    rig.put(A[:4])
    rig.put(A[4:8], parent=A[3])
    leases = [rig.acquire(A[:4]), rig.acquire(A[4:8])]
    assert isinstance(rig.failure(rig.acquire(A[:1])), ResourceExhaustedError)
    rig.reserve(B[:2], session=2, timeout_s=9.0)
    assert isinstance(
        rig.failure(rig.reserve(B[2:4], session=2, timeout_s=9.0), 2), ResourceExhaustedError
    )
    for lease in leases:
        rig.release(lease)
    rig.settle()
    rig.check()


def test_I7_open_acquires_and_reserves_of_a_session_have_so_many_keys() -> None:
    rig = Rig(16, open_keys_per_session_max=8, open_keys_max=12)
    rig.open(1)
    rig.open(2)
    rig.put(A[:8])
    same = [A[0]] * 4
    held = rig.acquire(A[:4])
    rig.acquire(same)
    assert isinstance(rig.failure(rig.acquire(A[:1])), ResourceExhaustedError)
    assert isinstance(rig.failure(rig.reserve(B[:1])), ResourceExhaustedError)
    rig.release(held, 0, 3)  # what is left keeps the memory of all of it
    assert isinstance(rig.failure(rig.acquire(A[:1])), ResourceExhaustedError)
    other = rig.reserve(B[:4], session=2)
    assert isinstance(rig.failure(rig.acquire(A[:1], session=2), 2), ResourceExhaustedError)
    rig.release(held)
    assert rig.granted(rig.acquire(A[:4]))
    rig.commit(other, B, [0, 1, 2, 3], session=2)
    assert rig.granted(rig.acquire(A[:2], session=2), 2)
    rig.check()
    for session in (1, 2):
        rig.apply(rig.core.session_settled(session, rig.now))
    rig.check()
    assert rig.core._blocks.open_keys.total == 0


def test_I7_a_short_prefix_does_not_keep_the_memory_of_all_the_keys_asked_for() -> None:
    rig = Rig(4)
    rig.open()
    rig.put(A[:1])
    rig.acquire([A[0], *chain("absent", 99)])
    [lease] = rig.core._sessions._by_id[1].leases.values()
    assert lease.size == 1
    assert lease.rows.base is None


def test_I7_one_session_does_not_take_all_places_of_those_that_wait() -> None:
    rig = Rig(2, waiting_max=4, waiting_per_session_max=2, wait_s_max=10.0)
    rig.open(1)
    rig.open(2)
    full = rig.reserve(A[:2])
    waiting = [rig.reserve([B[i]], timeout_s=1e9) for i in range(2)]
    assert isinstance(rig.failure(rig.reserve(B[2:3], timeout_s=1.0)), ResourceExhaustedError)
    assert rig.reserved(rig.reserve(B[2:3])).statuses == bytes([FULL]), "this one waits for nothing"
    waiting_too = rig.reserve(B[3:4], session=2, timeout_s=1e9)
    rig.check()
    rig.tick(9.0)
    assert (1, waiting[0]) not in rig.answers
    rig.tick(2.0)
    assert rig.reserved(waiting[1]).statuses == bytes([FULL])
    assert rig.reserved(waiting_too, 2).statuses == bytes([FULL])
    assert rig.reserve(B[:1], timeout_s=1.0)
    rig.check()
    del full


@pytest.mark.parametrize("count", [3, 1 << 25])
def test_I7_more_indices_than_keys_are_not_looked_at(dram: Rig, count: int) -> None:
    reserve = dram.reserve(A[:2])
    indices = range(count)  # one that can be gone through, and is not
    request = dram.next_id()
    dram.apply(dram.core.commit(1, request, reserve, indices, b"", AckLevel.MEMORY, 0.0))
    assert "indices for the 2 keys" in str(dram.failure(request))
    request = dram.next_id()
    dram.apply(dram.core.abort(1, request, reserve, indices, 0.0))
    assert "indices for the 2 keys" in str(dram.failure(request))


def test_I7_table_of_blocks_has_a_limit() -> None:
    rig = Rig(16, blocks_max=6)
    rig.open()
    assert rig.put(A[:8]).count(SLOT) == 6
    held = rig.acquire(A[:6])
    assert rig.put(B[:3], parent=B[9]) == bytes([FULL] * 3)
    rig.release(held)
    assert rig.put(B[:3]) == bytes([SLOT] * 3)
    rig.check()
    assert rig.get(A[:6]) == (3, EndReason.EVICTED)


def test_namespace_that_does_not_fit_is_refused(dram: Rig) -> None:
    with pytest.raises(InvalidArgumentError, match="does not fit into the DRAM pool"):
        dram.core.open_namespace(CacheSpec.raw("big", block_bytes=17 * BLOCK))
    with pytest.raises(InvalidArgumentError, match="tenant 'x'"):
        dram.core.open_namespace(CacheSpec.raw("big", block_bytes=1), "x")
    assert dram.core.open_namespace(dram.spec, "") is dram.namespace
    with pytest.raises(ConfigError, match="take one of"):
        Rig(4, dram_policy="random")
