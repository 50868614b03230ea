"""At the limit of namespaces the one used longest ago goes, if nothing needs it."""

import contextlib
import random

import pytest
from kvstore.core.keys import namespace_root
from kvstore.core.spec import CacheSpec
from kvstore.core.types import EndReason, Namespace, Tier
from kvstore.errors import NotFoundError, PreconditionError, ResourceExhaustedError

from tests.faults.columns import SEED
from tests.store.rig import BLOCK, Rig, chain

A, B = chain("A", 8), chain("B", 8)


def spec(name: object, block_bytes: int = BLOCK) -> CacheSpec:
    return CacheSpec.raw(str(name), block_bytes=block_bytes)


def names(rig: Rig) -> set[str]:
    return {n.spec.model for n in rig.core.namespaces() if n.spec is not None}


def is_gone(rig: Rig, namespace: Namespace) -> bool:
    """Whether a client that still knows its id is told so."""
    request = rig.next_id()
    rig.apply(rig.core.acquire(1, request, namespace.id, A[7], b"", 0.0, rig.now))
    body = rig.answers[1, request][-1]
    return isinstance(getattr(body, "error", None), NotFoundError)


def test_I7_any_number_of_namespaces_comes_and_goes() -> None:
    rig = Rig(16, 16, namespaces_max=4)
    rig.open()
    rig.put(A[:3])
    seen = {rig.namespace.id}
    for i in range(40):
        opened = rig.core.open_namespace(spec(i, BLOCK * (1 + i % 3)))
        assert opened.id not in seen
        seen.add(opened.id)
        assert len(rig.core.namespaces()) <= 4
    rig.settle()
    assert rig.get(A[:3]) == (3, EndReason.COMPLETE)
    assert rig.core.counters["dropped_namespaces"] == 37
    rig.check()


def test_the_one_used_longest_ago_goes() -> None:
    rig = Rig(16, namespaces_max=4)
    rig.open()
    rig.put(A[:1])
    for name in "xyz":
        rig.core.open_namespace(spec(name))
    rig.core.open_namespace(spec("x"))
    rig.core.open_namespace(spec("new"))
    assert names(rig) == {"test", "z", "x", "new"}


def test_an_old_id_never_names_another_namespace() -> None:
    rig = Rig(16, namespaces_max=2)
    rig.open()
    rig.put(A[:1])
    gone = rig.core.open_namespace(spec("gone"))
    new = rig.core.open_namespace(spec("new"))
    assert is_gone(rig, gone)
    again = rig.core.open_namespace(spec("gone"))
    assert again.root == gone.root
    assert len({gone.id, new.id, again.id}) == 3
    assert is_gone(rig, gone)
    assert is_gone(rig, new)
    assert not is_gone(rig, again)


def test_ids_end_rather_than_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.core.namespaces.ID_MAX", 3)
    rig = Rig(16, namespaces_max=2)
    rig.open()
    rig.put(A[:1])
    for name in "xy":
        rig.core.open_namespace(spec(name))
    with pytest.raises(ResourceExhaustedError, match="restart it"):
        rig.core.open_namespace(spec("z"))
    assert names(rig) == {"test", "y"}


@pytest.mark.parametrize("where", ["dram", "ssd", "filling", "quarantined", "placeholder"])
def test_a_namespace_with_blocks_stays(where: str) -> None:
    rig = Rig(16, 16, namespaces_max=1)
    rig.open()
    if where == "filling":
        rig.reserve(A[:1])
    elif where == "placeholder":
        rig.put(A[1:2], parent=A[0])
    else:
        rig.put(A[:2])
    if where == "ssd":
        rig.settle()
        rig.apply(rig.core.evict(Tier.DRAM, b"", 0, False, 0.0)[0])
    if where == "quarantined":
        rig.acquire(A[:2])
        rig.settle()
        rig.apply(rig.core.session_quarantined(1, 0.0))
        rig.apply(rig.core.purge(None, 0.0)[0])
        rig.settle()
    with pytest.raises(ResourceExhaustedError, match=r"1 namespaces .*close .*purge"):
        rig.core.open_namespace(spec("new"))
    if where not in ("filling", "quarantined"):  # then no session has it, and the blocks remain
        rig.apply(rig.core.session_settled(1, 0.0))
        with pytest.raises(ResourceExhaustedError):
            rig.core.open_namespace(spec("new"))
        rig.apply(rig.core.purge(None, 0.0)[0])
        rig.settle()
    else:
        rig.apply(rig.core.session_settled(1, 0.0))
    rig.core.open_namespace(spec("new"))
    assert names(rig) == {"new"}
    rig.check()


def test_a_removal_that_is_not_durable_keeps_its_namespace() -> None:
    rig = Rig(16, 16, namespaces_max=1)
    rig.open()
    rig.put(A[:2])
    rig.settle()
    rig.apply(rig.core.purge(None, 0.0)[0])
    rig.apply(rig.core.session_settled(1, 0.0))
    assert rig.disk.drops
    with pytest.raises(ResourceExhaustedError):
        rig.core.open_namespace(spec("new"))
    rig.settle()
    rig.core.open_namespace(spec("new"))


def test_a_session_keeps_what_it_opened_and_what_it_asked_for() -> None:
    rig = Rig(16, namespaces_max=2)
    rig.open(1)
    rig.open(2)
    rig.core.open_namespace(spec("kept"), session_id=1)
    rig.acquire(A[:1], session=2)
    with pytest.raises(ResourceExhaustedError):
        rig.core.open_namespace(spec("new"), session_id=2)
    rig.apply(rig.core.session_quarantined(1, 0.0))
    with pytest.raises(PreconditionError):
        rig.core.open_namespace(spec("new"), session_id=1)
    with pytest.raises(ResourceExhaustedError):
        rig.core.open_namespace(spec("new"), session_id=2)
    rig.apply(rig.core.session_settled(1, 0.0))
    rig.core.open_namespace(spec("new"), session_id=2)
    assert names(rig) == {"test", "new"}
    rig.apply(rig.core.session_settled(2, 0.0))
    rig.core.open_namespace(spec("newer"))
    assert names(rig) == {"new", "newer"}


def test_a_namespace_with_blocks_in_hbm_stays() -> None:
    rig = Rig(16, namespaces_max=1)
    held = {namespace_root(rig.spec)}
    with pytest.raises(ResourceExhaustedError):
        rig.core.open_namespace(spec("new"), in_hbm=lambda: held)
    rig.core.open_namespace(spec("new"), in_hbm=set)


def test_a_reserve_that_waits_keeps_its_namespace() -> None:
    rig = Rig(2, namespaces_max=2)
    rig.open(1)
    rig.open(2)
    rig.put(A[:2])
    lease = rig.acquire(A[:2])
    other = rig.core.open_namespace(spec("other"))
    rig.ns = other.id
    waits = rig.reserve(B[:1], session=2, timeout_s=5.0)
    with pytest.raises(ResourceExhaustedError):
        rig.core.open_namespace(spec("new"))
    rig.release(lease)
    rig.fill(waits, B[:1], session=2)
    rig.commit(waits, B[:1], [0], session=2)
    inventory = {(root, keys) for root, _, keys in rig.core.inventory()}
    assert (other.root, B[0]) in inventory


def test_blocks_stay_their_namespaces_own_in_any_order() -> None:
    pick = random.Random(SEED)
    rig = Rig(24, 48, namespaces_max=4)
    home: dict[bytes, bytes] = {}
    ids: dict[int, bytes] = {}
    for step in range(600):
        session = 1 + step % 3
        if not rig.core.session_holds(session) and pick.random() < 0.3:
            rig.apply(rig.core.session_settled(session, rig.now))
        with contextlib.suppress(PreconditionError):
            rig.open(session)
        name = pick.randrange(12)
        try:
            opened = rig.core.open_namespace(spec(name), session_id=session)
        except ResourceExhaustedError:
            rig.apply(rig.core.purge(pick.choice(list(ids.values())), rig.now)[0])
            continue
        assert ids.setdefault(opened.id, opened.root) == opened.root
        rig.ns = opened.id
        keys = chain(f"{name}", 3)
        home.update(dict.fromkeys(keys, opened.root))
        if pick.random() < 0.5:
            rig.put(keys, session=session)
        if pick.random() < 0.5 and rig.disk.pending:
            rig.disk_step(pick.randrange)
        for root, _, joined in rig.core.inventory():
            assert all(home[joined[i : i + 32]] == root for i in range(0, len(joined), 32))
        if step % 50 == 0:
            rig.settle()
            rig.check()
    rig.settle()
    rig.check()
    assert len(ids) > 12, "none came back"
