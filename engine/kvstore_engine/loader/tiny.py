"""Tiny models with seeded random weights, so that tests need no files."""

import hashlib
import zlib

import torch

from kvstore_engine.model_source import TINY_MODELS
from kvstore_engine.models.base import Decoder
from kvstore_engine.models.config import ModelConfig, RopeConfig
from kvstore_engine.models.registry import build_decoder

# Over 1 / sqrt(inputs), so that attention is selective and weighs more than the token itself:
# wrong KV bytes then change tokens, which is what tests want to see.
_QUERY_KEY_GAIN = 1.5
_OUTPUT_GAIN = 16.0


def tiny_config(name: str) -> ModelConfig:
    """Two layers, grouped-query attention, the byte tokenizer's 260 tokens."""
    architecture = TINY_MODELS[name]
    return ModelConfig(
        architecture=architecture,
        name=name,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=260,
        rope=RopeConfig(theta=10000.0),
        rms_eps=1e-6,
        max_context=8192,
        qk_norm=architecture == "qwen3",
        bos_token_id=256,
        eos_token_ids=(257, 259),
    )


def load_tiny(name: str, dtype: torch.dtype) -> tuple[Decoder, str]:
    """The tiny model ``name`` and its fingerprint; the same weights on every machine."""
    model = build_decoder(tiny_config(name), dtype)
    digest = hashlib.sha256()
    for weight_name, target in model.targets().items():
        weight = _random_weight(weight_name, target.shape)
        digest.update(weight.numpy().tobytes())
        target.copy_(weight)
    return model, digest.hexdigest()[:32]


def _random_weight(name: str, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) == 1:
        # Norms of queries and keys set the sharpness of attention, as the gain does elsewhere.
        gain = _QUERY_KEY_GAIN if "_norm.weight" in name and "self_attn" in name else 1.0
        return torch.rand(shape, generator=generator) * 0.5 + gain - 0.25
    scale = 1.0 if "embed" in name else shape[1] ** -0.5
    if "q_proj" in name or "k_proj" in name:
        scale *= _QUERY_KEY_GAIN
    if "o_proj" in name:
        scale *= _OUTPUT_GAIN
    return torch.randn(shape, generator=generator) * scale
