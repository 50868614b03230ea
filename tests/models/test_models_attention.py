"""Paged attention against a plain reference, at odd shapes."""

import pytest
import torch
from kvstore_engine import attention
from kvstore_engine.attention import AttentionPlan


def reference(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last tokens of one sequence, in float64."""
    tokens, heads, dim = queries.shape
    group = heads // keys.shape[1]
    keys = keys.double().repeat_interleave(group, 1)
    values = values.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", queries.double(), keys) * dim**-0.5
    hidden = torch.ones(tokens, len(keys), dtype=torch.bool).triu_(len(keys) - tokens + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1).float()


def run(lens: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, page_tokens: int) -> None:
    """``lens`` are (context, new tokens) of each sequence of one step."""
    layers, layer = 3, 1
    counts = [-(-(context + new) // page_tokens) for context, new in lens]
    free = torch.randperm(sum(counts) + 3)
    pages = torch.full((len(free), kv_heads, layers, 2, page_tokens, dim), torch.nan)
    tables = list(torch.split(free[: sum(counts)], counts))
    queries, keys, values, wanted, starts = [], [], [], [], [0]
    for (context, new), table in zip(lens, tables, strict=True):
        k, v = torch.randn(2, context + new, kv_heads, dim)
        q = torch.randn(new, heads, dim)
        for place in range(context):
            slot = pages[table[place // page_tokens], :, layer, :, place % page_tokens]
            slot[:, 0], slot[:, 1] = k[place], v[place]
        if context % page_tokens:
            # What was written in earlier steps had its page cleared first.
            pages[table[context // page_tokens]] = pages[table[context // page_tokens]].nan_to_num(
                0
            )
        wanted.append(reference(q, k, v))
        queries.append(q)
        keys.append(k[context:])
        values.append(v[context:])
        starts.append(starts[-1] + new)
    plan = AttentionPlan(starts, [context for context, _ in lens], tables, pages)
    out = plan.attend(layer, torch.cat(queries), torch.cat(keys), torch.cat(values))
    torch.testing.assert_close(out, torch.cat(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("page_tokens", [1, 16, 63])
@pytest.mark.parametrize(
    "lens",
    [[(0, 1)], [(0, 63)], [(63, 60)], [(64, 1)], [(5, 1), (0, 1), (200, 1)], [(7, 9), (31, 1)]],
    ids=str,
)
def test_I12_attention_equals_the_reference(lens: list[tuple[int, int]], page_tokens: int) -> None:
    run(lens, heads=6, kv_heads=2, dim=24, page_tokens=page_tokens)


def test_I12_query_blocks_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SCORES_MAX", 1)
    run([(40, 150), (0, 129)], heads=4, kv_heads=4, dim=8, page_tokens=16)


def test_I12_decode_groups_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_DECODE_PAGES_MAX", 4)
    run([(9, 1), (70, 1), (3, 1), (17, 1), (40, 1)], heads=4, kv_heads=2, dim=8, page_tokens=16)
