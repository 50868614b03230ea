"""Causal grouped-query attention over paged KV, on the CPU.

A tile is the K or the V of one head, layer and page: ``page_tokens x head_dim`` contiguous values.
Both paths gather the tiles of a context into a scratch that stays in cache (40 GB/s, a tenth of
the time that follows), as products over scattered tiles cost more than the copy.
"""

import itertools
from dataclasses import dataclass

import torch

from kvstore_engine.gemm import product

# Scores of one product: 8 MiB of float32, which the last-level cache holds.
_SCORES_MAX = 1 << 21
_QUERY_BLOCK_MIN = 64
# Pages of sequences that decode together; more of them would leave the cache.
_DECODE_PAGES_MAX = 256


@dataclass(frozen=True, slots=True)
class _Span:
    """One sequence of a step: its tokens' rows, the tokens before them, its pages."""

    start: int
    end: int
    context: int
    table: torch.Tensor


class AttentionPlan:
    """Index arithmetic of one step, done once and used by every layer.

    Takes the fields of an AttentionBatch. ``attend`` first writes the new keys and values of its
    layer into the pages, then lets every new token see its context and the new tokens up to
    itself.
    """

    def __init__(
        self,
        query_starts: list[int],
        context_lens: list[int],
        page_tables: list[torch.Tensor],
        pages: torch.Tensor,
    ) -> None:
        self.pages = pages
        spans = _spans(query_starts, context_lens, page_tables, pages.shape[4])
        self._plan_writes(spans)
        self.paths: list[_Prefill | _Decode] = [
            _Prefill(span, pages) for span in spans if span.end - span.start > 1
        ]
        decoding = [span for span in spans if span.end - span.start == 1]
        self.paths += [_Decode(group, pages) for group in _decode_groups(decoding)]
        # One scratch for all, as they run one behind the other.
        largest = max(path.tiles.count for path in self.paths)
        scratch = torch.empty(2, largest, pages.shape[4] * pages.shape[5], dtype=pages.dtype)
        for path in self.paths:
            path.tiles.use(scratch)

    def _plan_writes(self, spans: list[_Span]) -> None:
        page_tokens = self.pages.shape[4]
        rows, slots, begun = [], [], []
        for span in spans:
            total = span.context + span.end - span.start
            places = torch.arange(span.context, total)
            rows.append(span.table[places // page_tokens])
            slots.append(places % page_tokens)
            if total % page_tokens and total - total % page_tokens >= span.context:
                begun.append(span.table[-1:])
        self.rows, self.slots = torch.cat(rows), torch.cat(slots)
        if begun:
            # The rest of a page is read and weighed by zero, and zero times NaN would be NaN.
            self.pages[torch.cat(begun)] = 0

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """``[T, heads * head_dim]`` for queries ``[T, heads, head_dim]`` and new keys and values
        ``[T, kv_heads, head_dim]``.
        """
        self.pages[self.rows, :, layer, 0, self.slots] = keys
        self.pages[self.rows, :, layer, 1, self.slots] = values
        queries = queries * queries.shape[-1] ** -0.5
        out = torch.empty(queries.shape, dtype=queries.dtype)
        for path in self.paths:
            path.attend(layer, queries, out)
        return out.flatten(1)


def _spans(
    query_starts: list[int],
    context_lens: list[int],
    page_tables: list[torch.Tensor],
    page_tokens: int,
) -> list[_Span]:
    spans = []
    for (start, end), context, table in zip(
        itertools.pairwise(query_starts), context_lens, page_tables, strict=True
    ):
        num_pages = -(-(context + end - start) // page_tokens)
        spans.append(_Span(start, end, context, table[:num_pages]))
    return spans


def _decode_groups(spans: list[_Span]) -> list[list[_Span]]:
    """Sequences of one token each, in groups of at most _DECODE_PAGES_MAX pages or of one."""
    groups: list[list[_Span]] = []
    room = 0
    for span in spans:
        if len(span.table) > room:
            groups.append([])
            room = _DECODE_PAGES_MAX
        groups[-1].append(span)
        room -= len(span.table)
    return groups


class _Tiles:
    """Copies the K and V tiles of given pages and all heads of a layer into a scratch."""

    def __init__(self, pages: torch.Tensor, table: torch.Tensor, heads_first: bool) -> None:
        _, heads, layers, _, page_tokens, dim = pages.shape
        self.tiles = pages.view(-1, page_tokens * dim)
        head = torch.arange(heads)
        first = (
            table[None, :] * heads + head[:, None]
            if heads_first
            else table[:, None] * heads + head[None, :]
        )
        self.first = first.flatten() * (2 * layers)
        self.index = torch.empty_like(self.first)
        self.count = len(self.first)

    def use(self, scratch: torch.Tensor) -> None:
        """Gathers into ``scratch``: for keys and for values, ``count`` rows or more."""
        self.keys, self.values = scratch[0, : self.count], scratch[1, : self.count]

    def gather(self, layer: int) -> None:
        """Fills ``keys`` and ``values``, each ``[pages * heads, page_tokens * dim]``."""
        torch.add(self.first, 2 * layer, out=self.index)
        torch.index_select(self.tiles, 0, self.index, out=self.keys)
        torch.index_select(self.tiles, 0, self.index.add_(1), out=self.values)


@dataclass(frozen=True, slots=True)
class _QueryBlock:
    """New tokens ``first : last`` see the first ``columns`` places, less what ``mask`` hides.

    The mask begins at column ``seen``, the first that a token of the block must not see.
    """

    first: int
    last: int
    seen: int
    columns: int
    mask: torch.Tensor


class _Prefill:
    """Several new tokens of one sequence, in blocks of queries whose scores fit in cache."""

    def __init__(self, span: _Span, pages: torch.Tensor) -> None:
        self.rows = slice(span.start, span.end)
        self.kv_heads, self.page_tokens, self.dim = pages.shape[1], pages.shape[4], pages.shape[5]
        self.context = span.context
        self.tiles = _Tiles(pages, span.table, heads_first=True)
        self.blocks: list[_QueryBlock] = []

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        """Fills this sequence's rows of ``out`` ``[T, heads, dim]``; ``queries`` are scaled."""
        self.tiles.gather(layer)
        queries, out = queries[self.rows], out[self.rows]
        group = queries.shape[1] // self.kv_heads
        if not self.blocks:
            self.blocks = self._query_blocks(len(queries), group, queries.dtype)
        for head in range(self.kv_heads):
            keys = self.tiles.keys.view(self.kv_heads, -1, self.dim)[head]
            values = self.tiles.values.view(self.kv_heads, -1, self.dim)[head]
            heads = slice(head * group, (head + 1) * group)
            for block in self.blocks:
                tokens = slice(block.first, block.last)
                rows = queries[tokens, heads].transpose(0, 1)
                scores = product(rows.reshape(-1, self.dim), keys[: block.columns])
                scores.view(group, -1, block.columns)[:, :, block.seen :].add_(block.mask)
                torch.softmax(scores, dim=-1, out=scores)
                attended = product(scores, values[: block.columns].t())
                out[tokens, heads] = attended.view(group, -1, self.dim).transpose(0, 1)

    def _query_blocks(self, tokens: int, group: int, dtype: torch.dtype) -> list[_QueryBlock]:
        total = self.context + tokens
        size = _SCORES_MAX // (group * total) // _QUERY_BLOCK_MIN * _QUERY_BLOCK_MIN
        size = max(size, _QUERY_BLOCK_MIN)
        blocks = []
        for first in range(0, tokens, size):
            last = min(first + size, tokens)
            columns = -(-(self.context + last) // self.page_tokens) * self.page_tokens
            seen = self.context + first
            mask = torch.full((last - first, columns - seen), -torch.inf, dtype=dtype).triu_(1)
            blocks.append(_QueryBlock(first, last, seen, columns, mask))
        return blocks


class _Decode:
    """One new token in each of several sequences: small products over all their tiles at once.

    Sequences of any lengths lie one behind the other without padding; only their scores, few
    against the KV, are padded to the longest for the softmax.
    """

    def __init__(self, spans: list[_Span], pages: torch.Tensor) -> None:
        page_tokens = pages.shape[4]
        counts = torch.tensor([len(span.table) for span in spans])
        self.rows = torch.tensor([span.start for span in spans])
        self.tiles = _Tiles(pages, torch.cat([span.table for span in spans]), heads_first=False)
        self.kv_heads, self.page_tokens, self.dim = pages.shape[1], page_tokens, pages.shape[5]
        self.sequence = torch.repeat_interleave(torch.arange(len(spans)), counts)
        starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        self.place = torch.arange(len(self.sequence)) - starts
        self.longest = int(counts.max())
        seen = torch.tensor([span.context + 1 for span in spans])[self.sequence]
        slots = self.place[:, None] * page_tokens + torch.arange(page_tokens)
        self.mask = torch.zeros(slots.shape, dtype=pages.dtype)
        self.mask.masked_fill_(slots >= seen[:, None], -torch.inf).unsqueeze_(1)

    def attend(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        """Fills these sequences' rows of ``out`` ``[T, heads, dim]``; ``queries`` are scaled."""
        self.tiles.gather(layer)
        shape = (-1, self.page_tokens, self.dim)
        heads = queries.shape[1]
        group = heads // self.kv_heads
        spread = queries[self.rows[self.sequence]].view(-1, group, self.dim)
        scores = torch.bmm(spread, self.tiles.keys.view(shape).transpose(1, 2))
        weights = self._softmax(scores.view(-1, heads, self.page_tokens).add_(self.mask))
        parts = torch.bmm(
            weights.reshape(-1, group, self.page_tokens), self.tiles.values.view(shape)
        ).view(-1, heads, self.dim)
        if len(self.rows) == 1:
            out[self.rows] = parts.sum(0, keepdim=True)
        else:
            sums = torch.zeros(len(self.rows), heads, self.dim, dtype=out.dtype)
            out[self.rows] = sums.index_add_(0, self.sequence, parts)

    def _softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """Over all places of each sequence; ``scores`` are ``[pages, heads, page_tokens]``."""
        heads = scores.shape[1]
        padded = scores.unsqueeze(0)
        if len(self.rows) > 1:
            shape = (len(self.rows), self.longest, heads, self.page_tokens)
            padded = torch.full(shape, -torch.inf, dtype=scores.dtype)
            padded[self.sequence, self.place] = scores
        rows = padded.transpose(1, 2).reshape(len(self.rows), heads, -1).softmax(dim=-1)
        weights = rows.view(len(self.rows), heads, self.longest, -1).transpose(1, 2)
        return weights[0] if len(self.rows) == 1 else weights[self.sequence, self.place]
