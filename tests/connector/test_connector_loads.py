"""Loads: right bytes or a miss, and exactly one result each."""

import time
from collections.abc import Callable

import pytest
from kvstore.core.types import EndReason, Tier
from kvstore.errors import (
    InternalError,
    KVStoreError,
    ResourceExhaustedError,
    UnavailableError,
)
from kvstore_connector.outbox import FinishedLoad

from tests.connector.fake_store import FakeStore
from tests.connector.rig import Rig, wait_until


def test_stored_blocks_are_in_their_pages(rig: Rig) -> None:
    keys = rig.keys(10)
    rig.put(keys)
    assert rig.load(keys) == FinishedLoad("r", 10, "complete", {"dram": 10})
    assert rig.right(keys)
    assert rig.store.pinned == 0


def test_a_load_can_start_behind_blocks_that_the_engine_has(rig: Rig) -> None:
    keys = rig.keys(6)
    rig.put(keys)
    assert rig.load(keys, first=4).blocks == 2
    assert rig.right(keys[4:])


def test_blocks_are_counted_by_the_tier_they_came_from(rig: Rig) -> None:
    keys = rig.keys(8)
    rig.put(keys)
    rig.store.tiers = dict.fromkeys(keys[4:], Tier.SSD)
    assert rig.load(keys).blocks_by_tier == {"dram": 4, "ssd": 4}
    assert "prefetch 8" in rig.store.calls


def test_blocks_fetched_ahead_count_as_of_their_slower_tier(rig: Rig) -> None:
    keys = rig.keys(8)
    rig.put(keys)
    rig.store.tiers = dict.fromkeys(keys[2:], Tier.SSD)
    rig.core.on_request("r", keys)
    rig.store.tiers = {}
    assert rig.core.match("r", 1)[0] == 7
    rig.core.start_load("r", 1, list(range(7)))
    rig.wait(loads=1)
    assert rig.loads[0].blocks_by_tier == {"dram": 1, "ssd": 6}


def test_a_load_tells_why_the_chain_ended(rig: Rig) -> None:
    keys = rig.keys(6)
    rig.put(keys[:3])
    rig.store.reasons[keys[3]] = EndReason.EVICTED
    rig.store.run_blocks = 2
    assert rig.load(keys) == FinishedLoad("r", 3, "evicted", {"dram": 3})
    assert rig.core.end_reason("r") == "evicted"


def test_a_missing_block_gets_its_reason_without_waiting(rig: Rig) -> None:
    keys = rig.keys(3)
    rig.store.reasons[keys[0]] = EndReason.CORRUPT
    rig.core.on_request("r", keys)
    assert rig.core.end_reason("r") is None
    wait_until(lambda: rig.core.match("r", 0) == (0, "corrupt"))
    assert rig.core.end_reason("r") == "corrupt"
    rig.store.blocks[keys[0]] = bytes(512)
    assert rig.core.match("r", 0) == (1, "never_stored")
    rig.core.request_finished("r")
    assert rig.core.match("r", 0) == (0, "never_stored")


def test_a_block_stored_meanwhile_leaves_no_pin_behind(rig: Rig) -> None:
    keys = rig.keys(2)
    rig.core.on_request("r", keys)
    assert rig.core.match("r", 0)[0] == 0
    rig.core.match("r", 0)
    rig.put(keys)
    wait_until(lambda: rig.store.calls == ["acquire 1"])
    wait_until(lambda: rig.store.pinned == 0)


def test_match_beyond_the_prompt_is_complete(rig: Rig) -> None:
    keys = rig.keys(2)
    rig.core.on_request("r", keys)
    assert rig.core.match("r", 2) == (0, "complete")


def test_short_prefixes_are_left_alone(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(min_load_blocks=3)
    keys = rig.keys(5)
    rig.put(keys[:2])
    rig.core.on_request("r", keys)
    assert rig.core.match("r", 0)[0] == 0
    rig.put(keys[:3])
    assert rig.core.match("r", 0)[0] == 3


def test_a_producer_never_loads(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(role="kv_producer")
    keys = rig.keys(2)
    rig.put(keys)
    rig.core.on_request("r", keys)
    assert rig.core.match("r", 0) == (0, "never_stored")
    assert rig.store.calls == []


def test_unknown_request_ends_by_its_result(rig: Rig) -> None:
    rig.core.start_load("nobody", 0, [1])
    rig.wait(loads=1)
    assert rig.loads == [FinishedLoad("nobody", 0, "store_unavailable", {})]


def test_I4_reused_slots_are_discarded(rig: Rig) -> None:
    keys = rig.keys(4)
    rig.put(keys)
    rig.store.torn = True
    assert rig.load(keys) == FinishedLoad("r", 0, "store_unavailable", {})
    assert rig.store.pinned == 0


def test_blocks_of_another_size_are_a_miss(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    keys = rig.keys(4)
    rig.put(keys)
    rig.store.wrong_size = True
    assert rig.load(keys) == FinishedLoad("r", 0, "store_error", {})


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnavailableError("gone"), "store_unavailable"),
        (ResourceExhaustedError("full"), "no_space"),
        (InternalError("bug"), "store_error"),
    ],
)
def test_errors_of_the_node_are_misses(rig: Rig, error: KVStoreError, reason: str) -> None:
    keys = rig.keys(4)
    rig.put(keys)
    rig.core.on_request("r", keys)
    rig.store.raises = error
    rig.core.start_load("r", 0, [0, 1, 2, 3])
    rig.wait(loads=1)
    assert rig.loads == [FinishedLoad("r", 0, reason, {})]


def test_I9_a_load_ends_by_its_deadline_with_what_arrived(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(load_timeout_s=0.4)
    keys = rig.keys(8)
    rig.put(keys)
    rig.store.arrivals_max = 5
    started_s = time.monotonic()
    assert rig.load(keys) == FinishedLoad("r", 5, "timed_out", {"dram": 5})
    assert time.monotonic() - started_s < 2
    assert rig.right(keys[:5])
    wait_until(lambda: rig.core.connected)  # slow, not stalled: it answered the probe


def test_I9_a_stalled_node_costs_one_deadline(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(load_timeout_s=0.3)
    keys = rig.keys(4)
    rig.put(keys)
    rig.store.stalled = True
    assert rig.load(keys) == FinishedLoad("r", 0, "timed_out", {})
    rig.core.on_request("s", keys)
    assert rig.core.match("s", 0) == (0, "store_unavailable")
    rig.store.stalled = False
    wait_until(lambda: rig.core.match("s", 0)[0] == 4)
    assert rig.load(keys).blocks == 4


def test_I9_a_lost_session_ends_the_load(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(load_timeout_s=5.0)
    keys = rig.keys(8)
    rig.put(keys)
    rig.store.arrivals_max = 5
    rig.core.on_request("r", keys)
    rig.core.match("r", 0)
    rig.store.sessions[-1].closed = True
    rig.core.start_load("r", 0, list(range(8)))
    rig.wait(loads=1, timeout_s=2)
    assert rig.loads[0].end_reason == "store_unavailable"


def test_cancelled_loads_end_once_and_early(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(store=FakeStore(run_blocks=1))
    keys = rig.keys(40)
    rig.put(keys)
    rig.core.on_request("r", keys)
    blocks, _ = rig.core.match("r", 0)
    rig.core.start_load("r", 0, list(range(blocks)))
    rig.core.request_finished("r")
    rig.wait(loads=1)
    assert rig.loads[0].end_reason in ("released", "complete")
    assert rig.store.pinned == 0
    rig.poll()
    assert len(rig.loads) == 1


def test_close_ends_running_loads(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(load_timeout_s=60.0)
    keys = rig.keys(8)
    rig.put(keys)
    rig.store.arrivals_max = 5
    rig.core.on_request("r", keys)
    rig.core.start_load("r", 0, list(range(8)))
    rig.core.close()
    rig.poll()
    assert len(rig.loads) == 1
    rig.core.close()
