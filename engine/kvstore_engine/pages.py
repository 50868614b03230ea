"""KV page storage in block order, so that a page moves to and from the store as one copy."""

import math
import mmap
from pathlib import Path

import torch
from kvstore.config import format_size
from kvstore.errors import ConfigError

from kvstore_engine.models.config import ModelConfig


def allocate_pages(
    config: ModelConfig, num_pages: int, page_tokens: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Zeroed ``[page, kv_head, layer, 2 (k, v), token, head_dim]``, contiguous.

    Zeroed, as rows behind a sequence's end are read and masked: NaN times zero would be NaN. Every
    byte is backed by memory from the start, so that no request pays for page faults. ConfigError
    when the machine has not that much to give.
    """
    shape = (num_pages, config.num_kv_heads, config.num_layers, 2, page_tokens, config.head_dim)
    nbytes = math.prod(shape) * dtype.itemsize
    available = _available_bytes()
    if nbytes > available:
        raise ConfigError(
            f"{num_pages} KV pages take {format_size(nbytes)}, and {format_size(available)} of "
            "memory are available: lower kv_memory or num_pages"
        )
    # Private: shared memory gets huge pages only where the system's administrator says so.
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).zero_().view(shape)


def page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of one page."""
    return page_tokens * config.kv_bytes_per_token(dtype.itemsize)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo has no MemAvailable; kvstore-engine needs Linux")
