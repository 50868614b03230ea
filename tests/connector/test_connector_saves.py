"""Saves: pages come back exactly once, whatever becomes of them."""

import threading
from collections.abc import Callable

import pytest
from kvstore.errors import InternalError
from kvstore_connector import core
from kvstore_connector.saves import slots_to_fill

from tests.connector.fake_store import FakeStore
from tests.connector.rig import BLOCK_BYTES, Rig, content, wait_until


def stored_right(store: FakeStore, keys: list[bytes]) -> bool:
    return all(store.blocks.get(key) == content(key) for key in keys)


def test_saved_blocks_have_the_bytes_of_their_pages(rig: Rig) -> None:
    keys = rig.keys(10)
    rig.save(keys)
    rig.wait(pages=10)
    assert sorted(rig.pages) == list(range(10))
    wait_until(lambda: stored_right(rig.store, keys))


def test_blocks_that_the_store_has_are_skipped(rig: Rig) -> None:
    keys = rig.keys(10)
    rig.put(keys[:4])
    rig.save(keys)
    rig.wait(pages=10)
    wait_until(lambda: stored_right(rig.store, keys))
    assert rig.store.calls == ["reserve 6"]
    rig.save(keys)
    rig.wait(pages=20)
    assert rig.store.calls == ["reserve 6"]
    assert sorted(rig.pages) == sorted([*range(10), *range(10)])


def test_a_hole_in_the_store_is_filled(rig: Rig) -> None:
    keys = rig.keys(3)
    rig.put([keys[1]])
    rig.save(keys)
    rig.wait(pages=3)
    wait_until(lambda: stored_right(rig.store, keys))


def test_chains_that_continue_each_other_share_a_reserve(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(num_pages=128)
    keys = rig.keys(12)
    rig.store.hold_copy = threading.Event()
    rig.save(keys[:2])
    assert rig.store.in_copy.wait(10)
    rig.save(keys[2:5], keys[1], first_page=2)
    rig.save(keys[5:9], keys[4], first_page=5)
    other = rig.keys(2, seed=9)
    rig.save(other, first_page=20)
    rig.store.hold_copy.set()
    rig.wait(pages=11)
    wait_until(lambda: stored_right(rig.store, [*keys[:9], *other]))
    assert rig.store.calls == ["reserve 2", "reserve 7", "reserve 2"]


def test_large_chains_are_saved_in_batches(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(save_batch_bytes=4 * BLOCK_BYTES)
    keys = rig.keys(10)
    rig.save(keys)
    rig.wait(pages=10)
    wait_until(lambda: stored_right(rig.store, keys))
    assert rig.store.calls == ["reserve 4", "reserve 4", "reserve 2"]


def test_saves_wait_for_a_batch_while_a_request_runs(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(save_linger_s=60)
    keys = rig.keys(5)
    rig.core.on_request("runs", keys)
    rig.save(keys[:2])
    rig.save(keys[2:], keys[1], first_page=2)
    rig.core.on_request("ends first", keys)
    rig.core.request_finished("ends first")
    rig.core.request_finished("runs")
    rig.wait(pages=5)
    assert rig.store.calls == ["reserve 5"]


def test_an_engine_that_is_short_of_pages_has_them_saved_at_once(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(save_linger_s=60, num_pages=64)
    keys = rig.keys(10)
    rig.core.on_request("runs", keys)
    rig.save(keys[:2])
    rig.core.hurry_saves()
    rig.wait(pages=2)
    wait_until(lambda: stored_right(rig.store, keys[:2]))
    rig.save(keys[2:], keys[1], first_page=2)  # an eighth of its pages
    rig.wait(pages=10)
    assert rig.store.calls == ["reserve 2", "reserve 8"]


def test_a_small_queue_is_emptied_before_it_is_full(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(save_linger_s=60, num_pages=512, save_queue_bytes=8 * BLOCK_BYTES)
    keys = rig.keys(12)
    rig.core.on_request("runs", keys)
    for first in (0, 4, 8):
        rig.save(keys[first : first + 4], keys[first - 1] if first else None, first_page=first)
        rig.wait(pages=first + 4)
    wait_until(lambda: stored_right(rig.store, keys))


def test_nothing_waits_where_no_request_runs(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(save_linger_s=60)
    keys = rig.keys(3)
    rig.save(keys[:2])
    rig.wait(pages=2)
    rig.save(keys[2:], keys[1])
    rig.wait(pages=3)


def test_a_full_batch_does_not_wait_and_what_comes_behind_it_does(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(save_linger_s=60, save_batch_bytes=4 * BLOCK_BYTES)
    keys = rig.keys(7)
    rig.core.on_request("runs", keys)
    rig.store.hold_copy = threading.Event()
    rig.save(keys[:4])
    assert rig.store.in_copy.wait(10)
    rig.save(keys[4:6], keys[3], first_page=4)
    rig.store.hold_copy.set()
    rig.wait(pages=4)
    wait_until(lambda: stored_right(rig.store, keys[:4]))
    rig.save(keys[6:], keys[5], first_page=6)
    rig.core.request_finished("runs")
    rig.wait(pages=7)
    assert rig.store.calls == ["reserve 4", "reserve 3"]


def test_what_is_being_saved_is_not_saved_twice(rig: Rig) -> None:
    keys = rig.keys(6)
    rig.store.hold_copy = threading.Event()
    rig.save(keys[:4])
    assert rig.store.in_copy.wait(10)
    rig.save(keys[:3], first_page=10)
    rig.save(keys, first_page=20)
    rig.store.hold_copy.set()
    rig.wait(pages=13)
    wait_until(lambda: stored_right(rig.store, keys))
    assert rig.store.calls == ["reserve 4", "reserve 2"]
    assert len(rig.pages) == len(set(rig.pages)) == 13


def test_I7_a_full_queue_drops_the_tail_of_a_chain(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(save_queue_bytes=5 * BLOCK_BYTES)
    rig.store.hold_copy = threading.Event()
    keys = rig.keys(8)
    rig.save(keys)
    rig.wait(pages=3)
    assert sorted(rig.pages) == [5, 6, 7]
    assert rig.core.counters()["connector_saves_dropped_blocks"] == 3
    more = rig.keys(2, seed=1)
    rig.save(more, first_page=8)
    rig.wait(pages=5)
    rig.store.hold_copy.set()
    rig.wait(pages=10)
    wait_until(lambda: stored_right(rig.store, keys[:5]))
    assert not set(keys[5:] + more) & set(rig.store.blocks)


def test_pages_waiting_are_at_most_half_of_all(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(num_pages=8)
    rig.store.hold_copy = threading.Event()
    rig.save(rig.keys(6))
    rig.wait(pages=2)
    rig.store.hold_copy.set()
    rig.wait(pages=6)


def test_nothing_is_saved_behind_a_block_without_space(rig: Rig) -> None:
    rig.store.slots = 3
    keys = rig.keys(6)
    rig.save(keys)
    rig.wait(pages=6)
    wait_until(lambda: stored_right(rig.store, keys[:3]))
    wait_until(lambda: rig.core.counters().get("connector_saves_failed_blocks") == 3)
    assert len(rig.store.blocks) == 3


def test_slots_to_fill_ends_at_the_first_full_one() -> None:
    assert slots_to_fill([2, 1, 4, 1, 3, 1]) == ([1, 3], 4)
    assert slots_to_fill([1, 1]) == ([0, 1], 2)


def test_errors_give_the_pages_back(rig: Rig) -> None:
    rig.store.raises = InternalError("bug")
    rig.save(rig.keys(4))
    rig.wait(pages=4)
    rig.store.raises = RuntimeError("worse")
    rig.save(rig.keys(4))
    rig.wait(pages=8)
    rig.store.raises = None
    rig.save(rig.keys(4))
    rig.wait(pages=12)


def test_I9_a_stalled_node_gives_the_pages_back(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(save_timeout_s=0.2, save_batch_bytes=2 * BLOCK_BYTES)
    rig.store.stalled = True
    keys = rig.keys(8)
    rig.save(keys)
    rig.wait(pages=8, timeout_s=2)
    assert rig.store.calls[0] == "reserve 2"
    assert "reserve 2" not in rig.store.calls[1:]
    rig.store.stalled = False
    wait_until(lambda: rig.core.connected)
    rig.save(keys)
    rig.wait(pages=16)
    wait_until(lambda: stored_right(rig.store, keys))


def test_I2_a_copy_that_outlives_its_session_is_never_committed(rig: Rig) -> None:
    rig.store.hold_copy = threading.Event()
    rig.save(rig.keys(4))
    assert rig.store.in_copy.wait(10)
    rig.store.lose_session()
    wait_until(lambda: not rig.core.connected)
    rig.poll()
    assert rig.pages == []  # a page under a copy stays pinned
    assert rig.store.sessions[0].reconnections == 0  # and its slot is not given up
    rig.store.hold_copy.set()
    rig.wait(pages=4)
    wait_until(lambda: rig.core.connected)
    assert rig.store.writing == 0
    assert rig.store.blocks == {}


def test_I2_close_waits_for_the_copy_and_commits_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "FLUSH_S_MAX", 0.05)
    hold = rig.store.hold_copy = threading.Event()
    rig.save(rig.keys(4))
    assert rig.store.in_copy.wait(10)
    threading.Timer(0.3, hold.set).start()
    rig.core.close()
    assert hold.is_set()
    rig.poll()
    assert sorted(rig.pages) == [0, 1, 2, 3]
    assert rig.store.blocks == {}


def test_without_a_node_pages_come_back_at_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(store=FakeStore(away=True))
    rig.save(rig.keys(4))
    rig.poll()
    assert sorted(rig.pages) == [0, 1, 2, 3]


def test_a_consumer_never_saves(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(role="kv_consumer")
    rig.save(rig.keys(4))
    rig.poll()
    assert sorted(rig.pages) == [0, 1, 2, 3]
    assert rig.store.calls == []


def test_close_lets_queued_saves_end(rig: Rig) -> None:
    keys = rig.keys(12)
    rig.save(keys)
    rig.core.close()
    rig.poll()
    assert sorted(rig.pages) == list(range(12))
    assert stored_right(rig.store, keys)


def test_close_gives_pages_of_a_stuck_node_back(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "FLUSH_S_MAX", 0.05)
    rig = make_rig(save_batch_bytes=2 * BLOCK_BYTES)
    rig.store.stalled = True
    rig.save(rig.keys(8))
    rig.core.close()
    rig.poll()
    assert sorted(rig.pages) == list(range(8))
    assert rig.store.blocks == {}
