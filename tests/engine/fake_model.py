"""A model without arithmetic: every token depends on all KV before it, read from the pages."""

from collections.abc import Iterable
from itertools import pairwise

import torch
from kvstore_engine.models.base import AttentionBatch
from kvstore_engine.models.config import ModelConfig, RopeConfig

VOCAB = 97
EOS = 96
_MODULUS = 1_000_003


def fake_config(max_context: int = 4096) -> ModelConfig:
    """One layer, one head, two numbers a token: its id and its position."""
    return ModelConfig(
        architecture="fake",
        name="fake",
        hidden_size=1,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=1,
        vocab_size=VOCAB,
        rope=RopeConfig(),
        rms_eps=1e-6,
        max_context=max_context,
        eos_token_ids=(EOS,),
    )


def next_token(history: Iterable[int]) -> int:
    """The greedy token behind ``history``; never EOS."""
    return _digest(((token, i) for i, token in enumerate(history)), 0) % EOS


def greedy(prompt: list[int], count: int) -> list[int]:
    """What a plain run generates."""
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history))
    return history[len(prompt) :]


def _digest(pairs: Iterable[tuple[int, int]], start: int) -> int:
    for token, position in pairs:
        start = (start * 31 + token * 7 + position * 3 + 1) % _MODULUS
    return start


class FakeModel:
    """Writes (token, position) as keys and values and digests what it reads back."""

    def __init__(self) -> None:
        self.computed: list[tuple[int, int]] = []  # (position, token) of all that was computed
        self.largest_batch = 0

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch
    ) -> torch.Tensor:
        self.computed += zip(positions.tolist(), tokens.tolist(), strict=True)
        self.largest_batch = max(self.largest_batch, len(tokens))
        hidden: list[float] = []
        spans = list(pairwise(batch.query_starts))
        for span, context, table in zip(spans, batch.context_lens, batch.page_tables, strict=True):
            hidden += self._sequence(tokens[slice(*span)], context, table, batch.pages)
        assert positions.tolist() == [
            p
            for (a, b), c in zip(spans, batch.context_lens, strict=True)
            for p in range(c, c + b - a)
        ]
        return torch.tensor(hidden, dtype=torch.float64)[:, None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """One-hot."""
        chosen = (hidden[:, 0].long() % EOS)[:, None]
        return torch.zeros(len(hidden), VOCAB, dtype=torch.float64).scatter_(1, chosen, 1.0)

    def _sequence(
        self, tokens: torch.Tensor, context: int, table: torch.Tensor, pages: torch.Tensor
    ) -> list[float]:
        page_tokens = pages.shape[4]
        places = torch.arange(context, context + len(tokens))
        rows, slots = table[places // page_tokens], places % page_tokens
        for half in (0, 1):
            pages[rows, 0, 0, half, slots, 0] = tokens.double()
            pages[rows, 0, 0, half, slots, 1] = places.double()
        used = table[: -(-(context + len(tokens)) // page_tokens)]
        read = pages[used, 0, 0].sum(dim=1).div(2).flatten(0, 1)[: context + len(tokens)]
        pairs = [(int(token), int(position)) for token, position in read.tolist()]
        digest = _digest(pairs[:context], 0)
        digests: list[float] = []
        for pair in pairs[context:]:
            digest = _digest([pair], digest)
            digests.append(digest)
        return digests
