"""The Llama family: Llama 2 and 3, SmolLM2, TinyLlama and others of the same layout."""

import torch

from kvstore_engine.models.base import AttentionBlock, Decoder, Rotation
from kvstore_engine.models.layers import rotate


class LlamaAttention(AttentionBlock):
    """Grouped-query attention with rotary positions."""

    def position(self, queries_keys: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        return rotate(queries_keys, rotation)


class LlamaDecoder(Decoder):
    """A decoder of the Llama family."""

    def make_attention(self, layer: int) -> AttentionBlock:
        return LlamaAttention(self.config, layer, self.dtype)
