"""Causal grouped-query attention over paged KV, on the CPU."""

import itertools

import torch
from torch.nn import functional


class AttentionPlan:
    """Index arithmetic of one step, done once and used by every layer.

    Takes the fields of an AttentionBatch. ``attend`` writes the new keys and values of its layer
    into the pages first, then lets every new token see its context and the new tokens up to
    itself.
    """

    def __init__(
        self,
        query_starts: list[int],
        context_lens: list[int],
        page_tables: list[torch.Tensor],
        pages: torch.Tensor,
    ) -> None:
        self.spans = list(itertools.pairwise(query_starts))
        self.contexts = context_lens
        self.pages = pages
        page_tokens = pages.shape[4]
        self.tables = []
        rows, slots = [], []
        for (start, end), context, table in zip(self.spans, context_lens, page_tables, strict=True):
            total = context + end - start
            self.tables.append(table[: -(-total // page_tokens)])
            places = torch.arange(context, total)
            rows.append(table[places // page_tokens])
            slots.append(places % page_tokens)
        self.rows = torch.cat(rows)
        self.slots = torch.cat(slots)

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """``[T, heads * head_dim]`` for queries ``[T, heads, head_dim]`` and new keys and values
        ``[T, kv_heads, head_dim]``.
        """
        self.pages[self.rows, :, layer, 0, self.slots] = keys
        self.pages[self.rows, :, layer, 1, self.slots] = values
        out = torch.empty_like(queries)
        for (start, end), context, table in zip(
            self.spans, self.contexts, self.tables, strict=True
        ):
            total = context + end - start
            kv = self.pages[table, :, layer].permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :total]
            mask = torch.ones(end - start, total, dtype=torch.bool).tril_(context)
            attended = functional.scaled_dot_product_attention(
                queries[start:end].transpose(0, 1)[None],
                kv[0][None],
                kv[1][None],
                attn_mask=mask,
                enable_gqa=True,
            )
            out[start:end] = attended[0].transpose(0, 1)
        return out.flatten(1)
