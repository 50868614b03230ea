"""Sampling: greedy, the cuts, seeds, and log probabilities."""

import math

import pytest
import torch
from kvstore_engine.messages import SamplingParams
from kvstore_engine.sampler import make_generator, sample

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0, -4.0]])
GREEDY = SamplingParams(temperature=0.0)


def draw(params: SamplingParams, logits: torch.Tensor = LOGITS, count: int = 400) -> list[int]:
    generator = make_generator(params, fallback_seed=11)
    return [sample(logits, [params], [generator]).tokens[0] for _ in range(count)]


def test_greedy_takes_the_most_likely_and_needs_no_generator() -> None:
    assert make_generator(GREEDY, 1) is None
    assert sample(LOGITS, [GREEDY], [None]).tokens == [1]


def test_temperature_shapes_the_distribution() -> None:
    tokens = draw(SamplingParams(temperature=1.0), count=4000)
    for token, wanted in enumerate(LOGITS[0].softmax(-1).tolist()):
        assert tokens.count(token) / len(tokens) == pytest.approx(wanted, abs=0.03)
    assert set(draw(SamplingParams(temperature=0.01))) == {1}
    assert len(set(draw(SamplingParams(temperature=20.0)))) == 5


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
def test_a_temperature_that_is_0_in_float32_is_greedy(temperature: float) -> None:
    assert set(draw(SamplingParams(temperature=temperature), count=20)) == {1}


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(top_k=1), {1}),
        (SamplingParams(top_k=3), {1, 2, 3}),
        (SamplingParams(top_k=99, temperature=9.0), {0, 1, 2, 3, 4}),
        (SamplingParams(top_p=0.5), {1}),
        (SamplingParams(top_p=0.8), {1, 3}),
        (SamplingParams(top_p=0.0), {1}),
        (SamplingParams(top_k=2, top_p=0.99), {1, 3}),
    ],
    ids=repr,
)
def test_top_k_and_top_p_cut_the_tail(params: SamplingParams, allowed: set[int]) -> None:
    assert set(draw(params)) == allowed


def test_a_seed_repeats_whatever_else_is_in_the_batch() -> None:
    params = SamplingParams(seed=-3)
    alone = draw(params, count=20)
    generator, other = make_generator(params, 0), make_generator(SamplingParams(), 5)
    logits = LOGITS.repeat(3, 1)
    batched = [
        sample(logits, [SamplingParams(), GREEDY, params], [other, None, generator]).tokens[2]
        for _ in range(20)
    ]
    assert batched == alone
    assert draw(SamplingParams(seed=4), count=20) != alone


def test_banned_tokens_are_never_taken() -> None:
    result = sample(LOGITS.repeat(2, 1), [GREEDY, GREEDY], [None, None], banned=[(1, 3), ()])
    assert result.tokens == [2, 1]
    params = SamplingParams(temperature=5.0, top_p=0.9)
    generator = make_generator(params, 3)
    taken = {sample(LOGITS, [params], [generator], banned=[[1]]).tokens[0] for _ in range(200)}
    assert taken == {0, 2, 3, 4} or taken == {0, 2, 3}


def test_logprobs_are_the_models_own() -> None:
    wanted = LOGITS[0].log_softmax(-1).tolist()
    params = SamplingParams(temperature=0.0, logprobs=2)
    _, entry = sample(
        LOGITS.repeat(2, 1), [GREEDY, params], [None, None], banned=[(), (1,)]
    ).logprobs
    assert entry is not None
    assert entry.token == 3
    assert entry.logprob == pytest.approx(wanted[3])
    assert [token for token, _ in entry.top] == [1, 3]
    assert entry.top[0][1] == pytest.approx(wanted[1])
    none, zero = SamplingParams(temperature=0.0, logprobs=None), SamplingParams(0.0, logprobs=0)
    first, second = sample(LOGITS.repeat(2, 1), [none, zero], [None, None]).logprobs
    assert first is None
    assert second is not None
    assert second.top == []
    assert math.isclose(second.logprob, wanted[1], rel_tol=1e-5)
    assert (
        len((sample(LOGITS, [SamplingParams(0.0, logprobs=50)], [None]).logprobs[0] or entry).top)
        == 5
    )
