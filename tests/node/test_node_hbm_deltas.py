import pytest
from kvstore.core.types import Tier
from kvstore.errors import InvalidArgumentError
from kvstore.node import deltas
from kvstore.node.deltas import Deltas
from kvstore.node.hbm import HbmInventory

ROOT, OTHER = b"r" * 32, b"s" * 32


def key(i: int) -> bytes:
    return i.to_bytes(32, "little")


def keys(*numbers: int) -> bytes:
    return b"".join(map(key, numbers))


def test_hbm_inventory_follows_the_engine() -> None:
    hbm = HbmInventory()
    hbm.change(ROOT, "e", keys(1, 2, 3), b"")
    hbm.change(ROOT, "e", keys(4), keys(2))
    hbm.change(OTHER, "f", keys(9), b"")
    chunks = hbm.inventory(2)
    held = {
        k for root, engine, part in chunks for k in (part[:32], part[32:]) if root == ROOT and k
    }
    assert held == {key(1), key(3), key(4)}
    assert hbm.roots_of("e") == [ROOT]
    hbm.clear(ROOT, "e")
    hbm.clear(ROOT, "e")
    assert hbm.inventory(8) == [(OTHER, "f", key(9))]


def test_I7_hbm_inventory_is_bounded() -> None:
    hbm = HbmInventory(keys_max=3)
    hbm.change(ROOT, "e", keys(1, 2), b"")
    hbm.change(ROOT, "e", keys(3, 4), b"")
    assert hbm.refused == 2
    hbm.change(ROOT, "e", keys(3, 4), keys(1))
    assert sum(len(part) // 32 for _, _, part in hbm.inventory(8)) == 3


def test_I7_hbm_inventory_remembers_no_namespace_without_blocks() -> None:
    hbm = HbmInventory(keys_max=2)
    for i in range(10):
        hbm.change(bytes([i]) * 32, "e", b"k" * 32, b"")
        hbm.change(bytes([i]) * 32, "e", b"", b"k" * 32)
    assert hbm.roots() == set()
    hbm.change(b"r" * 32, "e", b"k" * 96, b"")
    hbm.change(b"r" * 32, "e", b"".join(bytes([i]) * 32 for i in range(3)), b"k" * 32)
    assert hbm.roots_of("e") == [b"r" * 32], "the master was told of what is refused here"


def test_an_engine_whose_keys_were_refused_is_cleared_whatever_came_after() -> None:
    hbm = HbmInventory(keys_max=2)
    hbm.change(ROOT, "e", b"".join(bytes([i]) * 32 for i in range(3)), b"")
    for i in range(2):
        hbm.change(ROOT, "e", b"", bytes([i]) * 32)
        assert hbm.roots_of("e") == [ROOT], "the master may have the others still"
    hbm.clear(ROOT, "e")
    assert hbm.roots_of("e") == []
    hbm.change(ROOT, "e", bytes(32), b"")
    hbm.change(ROOT, "e", b"", bytes(32))
    assert hbm.roots_of("e") == []


def test_deltas_merge_and_keep_their_order() -> None:
    waiting = Deltas()
    waiting.add(ROOT, Tier.DRAM, "", keys(1), b"", False)
    waiting.add(ROOT, Tier.DRAM, "", keys(2), b"", False)
    waiting.add(ROOT, Tier.SSD, "", keys(1), b"", False)
    waiting.add(ROOT, Tier.DRAM, "", b"", keys(1), False)
    waiting.add(ROOT, Tier.DRAM, "", keys(1), b"", False)
    waiting.add(ROOT, Tier.HBM, "e", keys(5), b"", False)
    waiting.add(ROOT, Tier.HBM, "e", b"", b"", True)
    events = [(Tier(e.tier), e.stored, e.removed, e.cleared) for e in waiting.take()]
    assert events == [
        (Tier.DRAM, keys(1, 2), b"", False),
        (Tier.SSD, keys(1), b"", False),
        (Tier.DRAM, keys(1), keys(1), False),
        (Tier.HBM, keys(5), b"", False),
        (Tier.HBM, b"", b"", True),
    ]
    assert waiting.take() == []


def test_I7_deltas_are_bounded() -> None:
    waiting = Deltas()
    for _ in range(2):
        waiting.add(ROOT, Tier.DRAM, "", bytes(deltas.BYTES_MAX * 3 // 4), b"", False)
    assert waiting.overflowed
    waiting.add(ROOT, Tier.DRAM, "", keys(1), b"", False)
    assert waiting.take() == []
    assert not waiting.overflowed


def test_a_malformed_change_of_hbm_changes_nothing() -> None:
    hbm = HbmInventory()
    hbm.change(ROOT, "e", keys(1, 2), b"")
    for stored, removed in ((b"short", keys(1)), (keys(3), b"short")):
        with pytest.raises(InvalidArgumentError):
            hbm.change(ROOT, "e", stored, removed, cleared=True)
    assert sorted(hbm.inventory(8)[0][2]) == sorted(keys(1, 2))
    hbm.change(ROOT, "e", keys(3), b"", cleared=True)
    assert hbm.inventory(8) == [(ROOT, "e", key(3))]


def test_I7_messages_without_keys_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "BYTES_MAX", 10 * deltas.EVENT_BYTES)
    waiting = Deltas()
    for _ in range(11):
        waiting.add(ROOT, Tier.HBM, "e", b"", b"", cleared=True)
    assert waiting.overflowed
    assert not waiting.take()


def test_I7_a_message_has_so_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "EVENT_KEYS_BYTES_MAX", 4 * 32)
    waiting = Deltas()
    waiting.add(ROOT, Tier.DRAM, "e", keys(*range(10)), keys(*range(20, 30)), True)
    waiting.add(ROOT, Tier.DRAM, "e", keys(10), b"", False)
    waiting.add(ROOT, Tier.DRAM, "e", keys(11, 12), b"", False)
    events = waiting.take()
    assert [len(e.stored) // 32 for e in events] == [0, 0, 0, 4, 4, 3, 2]
    assert [len(e.removed) // 32 for e in events] == [4, 4, 2, 0, 0, 0, 0]
    assert [e.cleared for e in events] == [True] + [False] * 6
    assert b"".join(e.stored for e in events) == keys(*range(13))
    assert b"".join(e.removed for e in events) == keys(*range(20, 30))
