"""The link: connects again by itself, keeps its root, and reports what is in pages."""

import asyncio
from collections.abc import Callable

import pytest
from kvstore.core.keys import namespace_root
from kvstore.core.types import Tier
from kvstore.errors import ResourceExhaustedError, UnavailableError
from kvstore_connector import link

from tests.connector.fake_store import FakeClient, FakeStore
from tests.connector.rig import SPEC, Rig, wait_until


def test_I9_a_lost_session_is_opened_again(rig: Rig) -> None:
    keys = rig.keys(4)
    rig.put(keys)
    rig.store.lose_session()
    wait_until(lambda: rig.store.sessions[0].reconnections == 1 and rig.core.connected)
    assert rig.load(keys).blocks == 4
    assert len(rig.store.sessions) == 1
    assert rig.core.counters()["connector_sessions_lost"] == 1


def test_a_node_that_comes_later_is_used(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(store=FakeStore(away=True))
    assert rig.core.root == namespace_root(SPEC)
    keys = rig.keys(4)
    rig.put(keys)
    assert rig.load(keys).end_reason == "store_unavailable"
    rig.store.away = False
    wait_until(lambda: rig.core.connected)
    assert rig.load(keys).blocks == 4


def test_a_node_that_stays_away_is_reported_once(
    make_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "BACKOFF_S_MAX", 0.02)
    monkeypatch.setattr(link, "BACKOFF_S_MIN", 0.02)
    caplog.set_level("INFO")
    store = FakeStore(away=True)
    attempts = 0
    connect = store.connect

    async def counted(on_lost: Callable[[], None]) -> FakeClient:
        nonlocal attempts
        attempts += 1
        return await connect(on_lost)

    monkeypatch.setattr(store, "connect", counted)
    rig = make_rig(store=store)
    wait_until(lambda: attempts >= 3)
    store.away = False
    wait_until(lambda: rig.core.connected and "is open" in caplog.text)
    assert caplog.text.count("going on without it") == 1


def test_the_root_is_the_nodes_own(make_rig: Callable[..., Rig]) -> None:
    assert make_rig(store=FakeStore(foreign_root=True)).core.root == bytes(32)


def test_a_node_with_another_root_is_not_used(
    make_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rig = make_rig()
    rig.store.foreign_root = True
    rig.store.lose_session()
    wait_until(lambda: "restart the engine" in caplog.text)
    assert not rig.core.connected
    assert rig.core.root == namespace_root(SPEC)


def test_start_does_not_wait_long_for_a_silent_node(make_rig: Callable[..., Rig]) -> None:
    class Silent(FakeStore):
        async def connect(self, on_lost: Callable[[], None]) -> FakeClient:
            await asyncio.sleep(60)
            raise UnavailableError("silent")

    rig = make_rig(store=Silent(), connect_timeout_s=0.05)
    assert not rig.core.connected


def test_unexpected_errors_do_not_end_the_link(
    make_rig: Callable[..., Rig], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(FakeStore):
        attempts = 0

        async def connect(self, on_lost: Callable[[], None]) -> FakeClient:
            self.attempts += 1
            if self.attempts == 1:
                raise RuntimeError("a bug")
            return await super().connect(on_lost)

    rig = make_rig(store=Broken())
    wait_until(lambda: rig.core.connected)
    assert "a bug" in caplog.text


def test_blocks_in_pages_reach_the_node(rig: Rig) -> None:
    a, b, c = rig.keys(3)
    rig.core.pages_changed([a, b], [])
    wait_until(lambda: rig.store.hbm == {a, b})
    rig.core.pages_changed([c], [a])
    wait_until(lambda: rig.store.hbm == {b, c})
    rig.store.hbm.clear()
    rig.store.lose_session()
    wait_until(lambda: rig.store.hbm == {b, c})


def test_blocks_in_pages_are_kept_for_a_node_that_is_away(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(store=FakeStore(away=True))
    keys = rig.keys(3)
    rig.core.pages_changed(keys, [])
    rig.store.away = False
    wait_until(lambda: rig.store.hbm == set(keys))


def test_blocks_in_pages_are_not_fetched_ahead(rig: Rig) -> None:
    keys = rig.keys(6)
    rig.put(keys)
    rig.store.tiers = dict.fromkeys(keys, Tier.SSD)
    rig.core.pages_changed(keys[:4], [])
    rig.core.on_request("r", keys[:4])
    rig.core.on_request("s", keys)
    wait_until(lambda: rig.store.calls == ["prefetch 2"])


def test_a_closed_connector_answers_with_misses(rig: Rig) -> None:
    keys = rig.keys(2)
    rig.put(keys)
    rig.core.on_request("r", keys)
    rig.core.close()
    assert rig.core.match("r", 0) == (0, "store_unavailable")
    rig.core.start_load("r", 0, [0, 1])
    rig.core.save(None, keys, [2, 3])
    rig.core.pages_changed(keys, [])
    rig.poll()
    assert [load.blocks for load in rig.loads] == [0]
    assert rig.pages == [2, 3]


def test_a_session_lost_under_a_lookup_is_a_miss(rig: Rig) -> None:
    keys = rig.keys(3)
    rig.put(keys[:2])
    rig.store.tiers = dict.fromkeys(keys, Tier.SSD)
    rig.store.sessions[0].closed = True  # and nobody noticed yet
    rig.core.on_request("r", keys)
    rig.save(keys)
    rig.core.pages_changed(keys, [])
    rig.wait(pages=3)
    rig.store.lose_session()
    wait_until(lambda: rig.store.sessions[0].reconnections == 1)
    wait_until(lambda: rig.store.hbm == set(keys))


def test_a_stall_during_a_lookup_is_noticed(rig: Rig) -> None:
    rig.store.stalled = True
    rig.core.on_request("r", rig.keys(2))
    rig.core.match("r", 0)
    wait_until(lambda: not rig.core.connected)
    wait_until(lambda: rig.core.counters().get("connector_stalls", 0) >= 1)
    rig.store.lose_session()
    wait_until(lambda: rig.store.sessions[0].reconnections == 1)
    rig.store.stalled = False
    wait_until(lambda: rig.core.connected)


def test_a_session_lost_under_a_probe_ends_it(rig: Rig) -> None:
    rig.store.stalled = True
    rig.core.on_request("r", rig.keys(2))
    rig.core.match("r", 0)
    wait_until(lambda: rig.core.counters().get("connector_stalls", 0) >= 1)
    rig.store.stalled = False
    rig.store.raises = UnavailableError("gone")
    wait_until(lambda: rig.store.calls.count("acquire 1") >= 3)
    rig.store.lose_session()
    wait_until(lambda: rig.store.sessions[0].reconnections == 1 and rig.core.connected)


def test_close_is_bounded_when_the_goodbye_is_not_answered(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "CLOSE_S_MAX", 0.05)
    rig = make_rig()

    async def never() -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(rig.store.sessions[0], "close", never)
    rig.core.close()
    assert not rig.core.connected


def test_a_node_that_refuses_a_probe_is_there(rig: Rig) -> None:
    rig.store.stalled = True
    rig.core.on_request("r", rig.keys(2))
    rig.core.match("r", 0)
    wait_until(lambda: rig.core.counters().get("connector_stalls", 0) >= 1)
    rig.store.raises = ResourceExhaustedError("busy")
    rig.store.stalled = False
    wait_until(lambda: rig.core.connected)
