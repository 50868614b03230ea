"""Scheduling: the token budget, order, admission, preemption."""

import pytest
from kvstore.core.keys import block_keys
from kvstore_engine.request import RequestState

from tests.engine.fake_connector import FakeConnector, Manner
from tests.engine.fake_model import FakeModel, greedy
from tests.engine.rig import ROOT, Rig


def prompt(first: int, length: int) -> list[int]:
    return [(first + i * 7) % 90 for i in range(length)]


def test_a_step_never_computes_more_than_its_budget() -> None:
    rig = Rig(max_batch_tokens=10, max_running=4, num_pages=64)
    for i in range(6):
        rig.add(f"r{i}", prompt(i, 23), 5)
    rig.run()
    assert isinstance(rig.model, FakeModel)
    assert rig.model.largest_batch == 10
    assert all(a.tokens == greedy(rig.prompts[n][0], 5) for n, a in rig.answers.items())


def test_a_long_prefill_does_not_hold_up_decoding() -> None:
    rig = Rig(max_batch_tokens=8, max_running=2, num_pages=64)
    rig.add("short", prompt(0, 4), 20)
    rig.step()
    rig.add("long", prompt(1, 60), 1)
    for expected in range(2, 8):
        rig.step()
        assert len(rig.answers["short"].tokens) == expected
    rig.run()


def test_requests_are_admitted_in_order_of_arrival() -> None:
    rig = Rig(max_running=1, max_batch_tokens=16)
    for i in range(3):
        rig.add(f"r{i}", prompt(i, 6), 3)
    ended: list[str] = []
    while len(ended) < 3:
        rig.step()
        ended += [n for n, a in rig.answers.items() if a.reason and n not in ended]
    assert ended == ["r0", "r1", "r2"]


def test_no_more_requests_hold_pages_than_max_running() -> None:
    connector = FakeConnector(ROOT, manner=Manner(load_delay_max=4))
    rig = Rig(connector, max_running=2, max_batch_tokens=64, num_pages=64)
    for i in range(5):
        rig.add(f"r{i}", prompt(i, 9), 6)
    while rig.engine.wait_s() is not None:
        rig.step()
        assert len(rig.engine.scheduler.running) + len(rig.engine.scheduler.loading) <= 2
    connector.close()


def test_the_youngest_is_preempted_and_still_answers_right() -> None:
    rig = Rig(num_pages=8, max_batch_tokens=32)
    rig.add("old", prompt(0, 11), 14)
    rig.add("young", prompt(1, 11), 14)
    preempted = False
    while rig.engine.wait_s() is not None:
        rig.step()
        waiting = [r.request_id for r in rig.engine.scheduler.waiting]
        preempted = preempted or (waiting == ["young"] and bool(rig.answers["young"].tokens))
        assert "old" not in waiting
    assert preempted
    assert rig.engine.scheduler.preemptions > 0
    for name, answer in rig.answers.items():
        assert answer.tokens == greedy(rig.prompts[name][0], 14)
    rig.engine.blocks.check_idle()


def test_what_a_prompt_computed_itself_before_it_was_preempted_is_not_cached() -> None:
    rig = Rig(num_pages=32, max_context=128)
    rig.add("old", [1] * 40, max_tokens=24)
    for _ in range(3):
        rig.step()
    rig.add("young", [i * 7 % 90 for i in range(84)], max_tokens=2)
    early = False
    while rig.engine.wait_s() is not None:
        before = rig.engine.scheduler.preemptions
        rig.step()
        early |= rig.engine.scheduler.preemptions > before and not rig.answers["young"].tokens
    assert early, "preempted before its first token"
    cache = rig.answers["young"].cache
    assert cache is not None
    assert cache.total == 0
    assert rig.engine.counters.cached_tokens["hbm"] == 0


def test_recompute_after_preemption_is_a_load_from_the_store() -> None:
    connector = FakeConnector(ROOT)
    rig = Rig(connector, num_pages=12, max_batch_tokens=32, max_context=32)
    rig.add("old", prompt(0, 15), 16)
    rig.add("young", prompt(1, 15), 16)
    rig.run()
    assert rig.engine.scheduler.preemptions > 0
    # The blocks that "young" computed before, its generated ones too, were not computed again.
    assert connector.loads_started > 0
    assert rig.answers["young"].tokens == greedy(prompt(1, 15), 16)
    assert rig.answers["young"].cache is not None
    assert rig.answers["young"].cache.total == 0  # its prompt came from nowhere when it began
    connector.close()


def test_a_look_up_that_takes_long_lets_others_pass() -> None:
    connector = FakeConnector(ROOT, manner=Manner(match_delay_max=30), seed=3)
    rig = Rig(connector, max_running=4)
    rig.add("slow", prompt(0, 9), 2)
    connector._known["slow"] = connector._known["slow"][0], 20
    rig.add("quick", prompt(1, 9), 2)
    connector._known["quick"] = connector._known["quick"][0], 0
    rig.step()
    scheduler = rig.engine.scheduler
    assert [r.request_id for r in scheduler.running] == ["quick"]
    assert 0 < (rig.engine.wait_s() or 0.001) <= 0.002
    rig.run()
    assert rig.answers["slow"].tokens == greedy(prompt(0, 9), 2)
    connector.close()


@pytest.mark.parametrize("length", [8, 9, 11, 12])
def test_the_last_prompt_token_is_always_computed(length: int) -> None:
    tokens = prompt(5, length)
    connector = FakeConnector(ROOT)
    rig = Rig(connector)
    assert isinstance(rig.model, FakeModel)
    rig.ask("cold", tokens, 1)
    rig.model.computed.clear()
    warm = rig.ask("warm", tokens, 1)
    assert (length - 1, tokens[-1]) in rig.model.computed
    cached = (length - 1) // 4 * 4
    assert len(rig.model.computed) == length - cached
    assert warm.cache is not None
    assert (warm.cache.hbm, warm.cache.end_reason) == (cached, "complete")
    other = Rig(FakeConnector(ROOT, connector.store))
    assert isinstance(other.model, FakeModel)
    loaded = other.ask("loaded", tokens, 1)
    assert (length - 1, tokens[-1]) in other.model.computed
    assert loaded.cache is not None
    assert (loaded.cache.dram, loaded.tokens) == (cached, warm.tokens)


def test_every_state_of_a_request_is_told() -> None:
    connector = FakeConnector(ROOT)
    Rig(connector).ask("first", prompt(0, 9), 1)
    slow = FakeConnector(ROOT, connector.store, Manner(load_delay_max=50), seed=1)
    rig = Rig(slow)
    rig.add("r", prompt(0, 9), 2)
    request = rig.engine._requests["r"]
    seen = [request.state]
    while rig.engine.wait_s() is not None:
        rig.step()
        if request.state is not seen[-1]:
            seen.append(request.state)
    states = RequestState.WAITING, RequestState.LOADING, RequestState.RUNNING
    assert seen == [*states, RequestState.FINISHED]


def test_hashing_is_done_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def counting(root: bytes, tokens: list[int], *rest: object, **more: object) -> list[bytes]:
        keys = block_keys(root, tokens, *rest, **more)  # type: ignore[arg-type]
        hashed.append(len(keys))
        return keys

    monkeypatch.setattr("kvstore_engine.request.block_keys", counting)
    rig = Rig(num_pages=64)
    rig.ask("r", prompt(0, 22), 11)
    # 33 tokens are 8 full blocks of 4; the last token, number 33, is not computed.
    assert sum(hashed) == 8
