"""KV page storage in block order, so that a page moves to and from the store as one copy."""

import torch

from kvstore_engine.models.config import ModelConfig


def allocate_pages(
    config: ModelConfig, num_pages: int, page_tokens: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Zeroed ``[page, kv_head, layer, 2 (k, v), token, head_dim]``, contiguous.

    Zeroed, as rows behind a sequence's end are read and masked: NaN times zero would be NaN.
    """
    heads, layers, dim = config.num_kv_heads, config.num_layers, config.head_dim
    return torch.zeros(num_pages, heads, layers, 2, page_tokens, dim, dtype=dtype)


def page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one page."""
    return page_tokens * config.kv_bytes_per_token(dtype.itemsize)
