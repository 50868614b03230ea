"""What a request may ask for, how it ends, and what is counted."""

import sys
from types import FrameType

import pytest
from kvstore.errors import InvalidArgumentError, KVStoreError, ResourceExhaustedError
from kvstore_engine.loader import load_model
from kvstore_engine.messages import AddRequest, SamplingParams

from tests.engine.fake_connector import FakeConnector
from tests.engine.fake_model import EOS, greedy
from tests.engine.rig import ROOT, Answer, Rig


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "empty"),
        ([1] * 40, 1, "40 tokens.*39"),
        ([1, 97], 1, "token id 97 .*give ids from 0 to 96"),
        ([-1], 1, "token id -1 "),
        ([1], 0, "max_tokens is 0"),
    ],
    ids=["empty", "long", "token", "negative", "max_tokens"],
)
def test_a_request_that_can_never_be_right_is_refused(
    prompt: list[int], max_tokens: int, message: str
) -> None:
    rig = Rig(max_context=40)
    with pytest.raises(InvalidArgumentError, match=message):
        rig.add("r", prompt, max_tokens)
    assert rig.engine.wait_s() is None


def test_an_id_is_used_once_at_a_time() -> None:
    rig = Rig()
    rig.add("r", [1])
    with pytest.raises(InvalidArgumentError, match="'r' is in use"):
        rig.add("r", [2])
    rig.run()
    assert rig.ask("r", [2]).tokens == greedy([2], 4)


def test_I7_more_waiting_requests_than_the_limit_are_refused() -> None:
    rig = Rig(max_waiting=2)
    rig.add("a", [1])
    rig.add("b", [1])
    with pytest.raises(ResourceExhaustedError, match="2 requests are waiting") as caught:
        rig.add("c", [1])
    assert isinstance(caught.value, KVStoreError)
    rig.run()


def test_a_stop_token_ends_a_request_and_is_its_last_token() -> None:
    expected = greedy([1, 2, 3], 8)
    stop = expected[4]
    answer = Rig().ask("r", [1, 2, 3], 8, stop_token_ids=(stop,))
    assert answer.reason == "stop"
    assert answer.tokens == expected[: expected.index(stop) + 1]


def test_min_tokens_keeps_stop_tokens_away() -> None:
    stop = greedy([1, 2, 3], 1)[0]
    answer = Rig().ask("r", [1, 2, 3], 8, stop_token_ids=(stop,), min_tokens=3)
    assert stop not in answer.tokens[:3]
    assert len(answer.tokens) >= 3


def test_eos_ends_a_request_unless_it_is_to_be_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    stop = greedy([5, 6], 3)[2]
    monkeypatch.setattr(rig.engine, "_eos_token_ids", frozenset({EOS, stop}))
    ended = rig.ask("r", [5, 6], 6)
    assert ended.reason == "stop"
    assert ended.tokens[-1] == stop
    ignored = rig.ask("ignored", [5, 6], 6, ignore_eos=True)
    assert (ignored.reason, len(ignored.tokens)) == ("length", 6)


def test_the_context_ends_a_request() -> None:
    answer = Rig(max_context=20).ask("r", [1] * 15, 50)
    assert (answer.reason, len(answer.tokens)) == ("length", 5)


def test_the_pages_bound_the_context() -> None:
    rig = Rig(num_pages=4)
    assert rig.engine.max_context == 16
    assert len(rig.ask("r", [1] * 10, 50).tokens) == 6
    with_store = Rig(FakeConnector(ROOT), num_pages=8)
    assert with_store.engine.max_context == 28


def test_logprobs_come_with_each_token() -> None:
    rig = Rig()
    rig.add("r", [1, 2], 2, logprobs=3)
    outputs = rig.engine.step() + rig.engine.step()
    assert [len(o.logprobs or ()) for o in outputs] == [1, 1]
    assert outputs[0].logprobs is not None
    assert outputs[0].logprobs[0].token == outputs[0].tokens[0]
    assert len(outputs[0].logprobs[0].top) == 3


def test_a_seed_gives_the_same_tokens_whatever_else_runs() -> None:
    alone = Rig().ask("r", [1, 2, 3], 12, temperature=5.0, seed=7)
    busy = Rig(num_pages=10, max_batch_tokens=8)
    busy.add("other", [4] * 9, 12, temperature=2.0)
    busy.add("r", [1, 2, 3], 12, temperature=5.0, seed=7)
    busy.run()
    assert busy.answers["r"].tokens == alone.tokens


def test_reset_forgets_the_prefix_cache() -> None:
    rig = Rig()
    prompt = list(range(13))
    rig.ask("a", prompt, 1)
    assert rig.engine.reset_cache() == 3
    answer = rig.ask("b", prompt, 1)
    assert answer.cache is not None
    assert (answer.cache.total, answer.cache.end_reason) == (0, "never_stored")


def test_counters_say_what_happened() -> None:
    connector = FakeConnector(ROOT)
    rig = Rig(connector)
    prompt = list(range(13))
    rig.ask("a", prompt, 2)
    rig.ask("b", prompt, 2)
    rig.add("c", prompt)
    rig.engine.abort("c")
    stats = rig.engine.stats()
    counters = stats.counters
    assert (stats.running, stats.waiting, stats.loading) == (0, 0, 0)
    assert (stats.pages_total, stats.pages_free) == (32, 32)
    assert (counters["prompt_tokens"], counters["generated_tokens"]) == (26, 4)
    assert counters["computed_tokens"] == 14 + 2
    assert counters["fake_loads"] == 0
    assert stats.labelled["cached_tokens"]["hbm"] == 12
    assert stats.labelled["prefix_end"] == {"never_stored": 1, "complete": 1}
    assert stats.labelled["finished"] == {"length": 2, "abort": 1}


def test_bookkeeping_of_a_step_costs_a_few_calls_a_request() -> None:
    def calls_of_a_step(requests: int) -> float:
        rig = Rig(num_pages=2048, page_tokens=16, max_batch_tokens=512, max_running=requests)
        for i in range(requests):
            rig.add(f"r{i}", [(i + j) % 90 for j in range(100)], 40)
        while rig.engine.scheduler.waiting:
            rig.engine.step()
        calls = 0

        def count(_frame: FrameType, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        rig.engine._clock = lambda: float(calls)  # what it takes for seconds
        before = rig.engine.counters.schedule_seconds
        sys.setprofile(count)
        try:
            for _ in range(20):
                rig.engine.step()
        finally:
            sys.setprofile(None)
        return (rig.engine.counters.schedule_seconds - before) / 20

    few, many = calls_of_a_step(8), calls_of_a_step(32)
    assert (many - few) / 24 < 50  # 32 are made; a call takes 0.1 to 0.3 us
    assert many < 32 * 50


def test_the_warm_up_stays_within_a_context_shorter_than_a_batch() -> None:
    loaded = load_model("tiny-random")
    context = loaded.config.max_context
    rig = Rig(
        model=loaded.model,
        model_config=loaded.config,
        page_tokens=64,
        num_pages=context // 64 + 4,
        max_batch_tokens=2 * context,
        warm_up=True,
    )
    rig.add("a", [1, 2, 3], max_tokens=1)
    rig.run()
    assert len(rig.answers["a"].tokens) == 1


def test_choices_share_their_prompt_until_they_have_tokens_of_their_own() -> None:
    rig = Rig(max_running=1)
    message = AddRequest(
        "a", [1, 2, 3], SamplingParams(temperature=0, max_tokens=4), others=[("b", 7), ("c", None)]
    )
    for choice in message.choices():
        rig.engine.add_request(choice)
        rig.answers[choice.request_id] = Answer()
    rig.step()
    a, b, c = (rig.engine._requests[name] for name in "abc")
    assert len(a.tokens) == 4
    assert b.tokens is c.tokens is message.prompt_tokens
    assert (b.params.seed, c.params.seed) == (7, None)
    rig.run()
    assert [len(answer.tokens) for answer in rig.answers.values()] == [4, 4, 4]
    assert message.prompt_tokens == [1, 2, 3]
