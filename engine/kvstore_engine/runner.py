"""Runs the model over one step's chunks and samples where a chunk reaches the end."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch

from kvstore_engine.messages import TokenLogprob
from kvstore_engine.models.base import AttentionBatch
from kvstore_engine.request import Request
from kvstore_engine.sampler import sample
from kvstore_engine.scheduler import Chunk


class Model(Protocol):
    """What the runner needs of a decoder; ``models.base.Decoder`` states the contract."""

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch
    ) -> torch.Tensor:
        """Hidden states of ``tokens``, whose KV it writes into the batch's pages."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states."""
        ...


class Runner:
    """The model, its pages, and the step from chunks to sampled tokens."""

    def __init__(self, model: Model, pages: torch.Tensor, eos_token_ids: Sequence[int]) -> None:
        self.pages = pages
        self._model = model
        self._eos_token_ids = tuple(eos_token_ids)

    @torch.inference_mode()
    def execute(self, chunks: Sequence[Chunk]) -> dict[str, tuple[int, TokenLogprob | None]]:
        """Computes all chunks; the next token of each request whose chunk reaches its end."""
        hidden = self._forward(chunks)
        ends = list(accumulate(chunk.num_tokens for chunk in chunks))
        rows = [i for i, chunk in enumerate(chunks) if chunk.reaches_end]
        if not rows:
            return {}
        last = hidden[torch.tensor([ends[i] - 1 for i in rows])]
        requests = [chunks[i].request for i in rows]
        sampled = sample(
            self._model.logits(last),
            [request.params for request in requests],
            [request.generator for request in requests],
            [self._banned(request) for request in requests],
        )
        pairs = zip(sampled.tokens, sampled.logprobs, strict=True)
        return {r.request_id: pair for r, pair in zip(requests, pairs, strict=True)}

    @torch.inference_mode()
    def warm_up(self, max_batch_tokens: int) -> None:
        """Touches all pages and runs a prefill and a decode, so that the first request is fast.

        Call before any page is in use: page contents are overwritten.
        """
        self.pages.zero_()
        num_pages, page_tokens = self.pages.shape[0], self.pages.shape[4]
        table = torch.arange(num_pages, dtype=torch.int64)
        prefill = min(max_batch_tokens, num_pages * page_tokens - 1)
        for first, count in ((0, prefill), (prefill, 1)):
            batch = AttentionBatch([0, count], [first], [table], self.pages)
            tokens = torch.zeros(count, dtype=torch.int64)
            hidden = self._model(tokens, torch.arange(first, first + count), batch)
            self._model.logits(hidden[-1:])
        self.pages.zero_()

    def _forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        tokens: list[int] = []
        positions: list[int] = []
        starts = [0]
        for request, first, count in chunks:
            tokens += request.tokens[first : first + count]
            positions += range(first, first + count)
            starts.append(len(tokens))
        batch = AttentionBatch(
            query_starts=starts,
            context_lens=[chunk.first for chunk in chunks],
            page_tables=[chunk.request.page_table() for chunk in chunks],
            pages=self.pages,
        )
        return self._model(torch.tensor(tokens), torch.tensor(positions), batch)

    def _banned(self, request: Request) -> Sequence[int]:
        """Tokens that would end the request before its ``min_tokens``."""
        if request.num_output >= request.params.min_tokens:
            return ()
        return self._eos_token_ids + request.params.stop_token_ids
