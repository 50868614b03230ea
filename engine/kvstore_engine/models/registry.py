"""From an architecture's name to its decoder."""

import torch

from kvstore_engine.model_source import ModelLoadError
from kvstore_engine.models.base import Decoder
from kvstore_engine.models.config import ModelConfig
from kvstore_engine.models.llama import LlamaDecoder
from kvstore_engine.models.qwen3 import Qwen3Decoder

ARCHITECTURES: dict[str, type[Decoder]] = {"llama": LlamaDecoder, "qwen3": Qwen3Decoder}


def build_decoder(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder of ``config`` with weights still to be loaded."""
    decoder = ARCHITECTURES.get(config.architecture)
    if decoder is None:
        raise ModelLoadError(
            f"architecture {config.architecture!r} is not supported; "
            f"known are {', '.join(sorted(ARCHITECTURES))}"
        )
    return decoder(config, dtype)
