"""Decoders: one file a model family, and the parts they share."""

from kvstore_engine.models.base import AttentionBatch, Decoder
from kvstore_engine.models.config import ModelConfig, RopeConfig
from kvstore_engine.models.registry import ARCHITECTURES, build_decoder

__all__ = [
    "ARCHITECTURES",
    "AttentionBatch",
    "Decoder",
    "ModelConfig",
    "RopeConfig",
    "build_decoder",
]
