"""From a name or path to a decoder with its weights."""

from dataclasses import dataclass
from pathlib import Path

import torch

from kvstore_engine.loader.directory import load_directory
from kvstore_engine.loader.gguf_file import load_gguf
from kvstore_engine.loader.tiny import load_tiny
from kvstore_engine.model_source import ModelLoadError, ModelSource, SourceKind, find_model
from kvstore_engine.models.base import Decoder
from kvstore_engine.models.config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A decoder ready to run; ``fingerprint`` is a hex digest over its files' bytes.

    ``tokenizer_source`` is what ``load_tokenizer`` takes for the model's own tokenizer.
    """

    model: Decoder
    config: ModelConfig
    fingerprint: str
    tokenizer_source: str

    @property
    def model_id(self) -> str:
        """The model's id in a CacheSpec: from what its files hold, wherever they lie."""
        return self.config.name or f"{self.config.architecture}-{self.fingerprint[:8]}"


def load_model(path_or_name: str | Path, dtype: str = "float32") -> LoadedModel:
    """Loads a built-in name, a ``*.gguf`` file or a Hugging Face directory.

    Raises ModelLoadError with what is wrong and what to give instead.
    """
    if dtype not in DTYPES:
        raise ModelLoadError(f"dtype {dtype!r} is not supported; take one of {sorted(DTYPES)}")
    model, fingerprint = read_model(find_model(path_or_name), DTYPES[dtype])
    model.pack()
    return LoadedModel(model.eval(), model.config, fingerprint, str(path_or_name))


def read_model(source: ModelSource, dtype: torch.dtype) -> tuple[Decoder, str]:
    """The decoder, its weights readable by name until it is packed, and their fingerprint."""
    if source.kind is SourceKind.TINY:
        return load_tiny(source.name, dtype)
    if source.kind is SourceKind.GGUF:
        return load_gguf(source.location, dtype)
    return load_directory(source.location, dtype)
