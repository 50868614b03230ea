"""From logits to tokens: greedy, temperature, top-k, top-p, seeds and log probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore_engine.messages import SamplingParams, TokenLogprob

TEMPERATURE_MIN = 1e-6  # less is the same, until it is 0 in float32 and divides 0 by 0


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token a row, and log probabilities where they were asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprob | None]


def make_generator(params: SamplingParams, fallback_seed: int) -> torch.Generator | None:
    """The random numbers of one request, its own so that they do not depend on the batch.

    None for a greedy request. ``fallback_seed`` is taken when the request names none.
    """
    if params.temperature <= 0:
        return None
    seed = fallback_seed if params.seed is None else params.seed
    return torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)


def sample(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    generators: Sequence[torch.Generator | None],
    banned: Sequence[Sequence[int]] = (),
) -> Sampled:
    """One token for each row of ``logits`` ``[R, vocab]``.

    ``banned[r]`` are token ids that row r must not take, such as the end of sequence before
    ``min_tokens``. Log probabilities are of the model's own distribution, before temperature.
    """
    logits = logits.float()
    choosable = _without_banned(logits, banned)
    greedy = choosable.argmax(dim=-1).tolist()
    tokens = [
        greedy[r] if p.temperature <= 0 else _draw(choosable[r], p, generators[r])
        for r, p in enumerate(params)
    ]
    logprobs = [
        None if p.logprobs is None else _logprob(logits[r], tokens[r], p.logprobs)
        for r, p in enumerate(params)
    ]
    return Sampled(tokens, logprobs)


def _without_banned(logits: torch.Tensor, banned: Sequence[Sequence[int]]) -> torch.Tensor:
    if not any(banned):
        return logits
    logits = logits.clone()
    for row, ids in enumerate(banned):
        if ids:
            logits[row, list(ids)] = -torch.inf
    return logits


def _draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """A token of one row by the Gumbel trick: the least of exponentials over probabilities."""
    ids: torch.Tensor | None = None
    if 0 < params.top_k < len(logits):
        logits, ids = logits.topk(params.top_k)
    # Shifting by the maximum first keeps tiny temperatures from overflowing.
    temperature = max(params.temperature, TEMPERATURE_MIN)
    probabilities = ((logits - logits.max()) / temperature).softmax(dim=-1)
    if params.top_p < 1:
        probabilities, order = probabilities.sort(descending=True)
        ids = order if ids is None else ids[order]
        before = probabilities.cumsum(dim=-1) - probabilities
        # The first token always stays: nothing comes before it.
        probabilities = probabilities.where(before < params.top_p, 0)
        probabilities[0] = probabilities[0].clamp_min(1e-30)
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    choice = int((probabilities / noise).argmax())
    return choice if ids is None else int(ids[choice])


def _logprob(logits: torch.Tensor, token: int, alternatives: int) -> TokenLogprob:
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(alternatives, len(logits)))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token=token, logprob=float(logprobs[token]), top=top)
