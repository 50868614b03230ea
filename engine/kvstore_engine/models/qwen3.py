"""Qwen3, dense: Llama's layout with a norm on each query and key head."""

from collections.abc import Iterator

import torch

from kvstore_engine.models.base import AttentionBlock, Decoder, Rotation
from kvstore_engine.models.config import ModelConfig
from kvstore_engine.models.layers import RmsNorm, rotate


class Qwen3Attention(AttentionBlock):
    """Grouped-query attention whose queries and keys are normed before they are rotated."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__(config, layer, dtype)
        self.query_norm = RmsNorm(config.head_dim, config.rms_eps, dtype)
        self.key_norm = RmsNorm(config.head_dim, config.rms_eps, dtype)

    def position(self, queries_keys: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        heads = self.config.num_heads
        queries = self.query_norm(queries_keys[:, :heads])
        keys = self.key_norm(queries_keys[:, heads:])
        return rotate(torch.cat([queries, keys], dim=1), rotation)

    def targets(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from super().targets()
        yield "q_norm.weight", self.query_norm.weight
        yield "k_norm.weight", self.key_norm.weight


class Qwen3Decoder(Decoder):
    """A dense Qwen3 decoder."""

    def make_attention(self, layer: int) -> AttentionBlock:
        return Qwen3Attention(self.config, layer, self.dtype)
