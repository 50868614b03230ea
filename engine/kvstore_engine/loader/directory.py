"""Models in Hugging Face directories: config.json and safetensors, in one file or several."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvstore_engine.loader.fingerprint import fingerprint_files
from kvstore_engine.model_files import directory_architecture, end_tokens, printable, read_json
from kvstore_engine.model_source import ModelLoadError
from kvstore_engine.models.base import Decoder
from kvstore_engine.models.config import ModelConfig, RopeConfig
from kvstore_engine.models.registry import build_decoder

_INDEX = "model.safetensors.index.json"


def load_directory(path: Path, dtype: torch.dtype) -> tuple[Decoder, str]:
    """The decoder in a Hugging Face directory, and the fingerprint of its files."""
    config = directory_config(path)
    files = _weight_files(path)
    model = build_decoder(config, dtype)
    model.load(_weights(files))
    return model, fingerprint_files([path / "config.json", *files])


def directory_config(path: Path) -> ModelConfig:
    """``config.json`` as a ModelConfig, with the end tokens that other files name."""
    raw = read_json(path / "config.json")
    architecture = directory_architecture(raw, path)
    for key in ("mlp_bias", "use_sliding_window"):
        if raw.get(key):
            raise ModelLoadError(f"{path}: {key} is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelLoadError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported")
    try:
        heads = int(raw["num_attention_heads"])
        return ModelConfig(
            architecture=architecture,
            name=printable(raw.get("_name_or_path")),
            hidden_size=int(raw["hidden_size"]),
            num_layers=int(raw["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // heads),
            intermediate_size=int(raw["intermediate_size"]),
            vocab_size=int(raw["vocab_size"]),
            rope=_rope(raw, path),
            rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_context=int(raw.get("max_position_embeddings", 2048)),
            qk_norm=architecture == "qwen3",
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            bos_token_id=raw.get("bos_token_id"),
            # A tokenizer may know more tokens than the model.
            eos_token_ids=tuple(t for t in end_tokens(path, raw) if t < int(raw["vocab_size"])),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelLoadError(f"{path / 'config.json'} is not usable: {error!r}") from error


def _rope(raw: Mapping[str, Any], path: Path) -> RopeConfig:
    """Both spellings: rope_theta with rope_scaling, and the newer rope_parameters."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelLoadError(f"{path}: rotary embedding of a part of the head is not supported")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=float(scaling["factor"]))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            scaling="llama3",
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_context=int(scaling["original_max_position_embeddings"]),
        )
    raise ModelLoadError(f"{path}: rope scaling {kind!r} is not supported")


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up the model; ModelLoadError when one is missing."""
    if (path / _INDEX).is_file():
        shards = read_json(path / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(
            isinstance(name, str) and Path(name).name == name for name in shards.values()
        ):
            raise ModelLoadError(f"{path / _INDEX} has no usable weight_map")
        files = [path / name for name in sorted(set(shards.values()))]
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ModelLoadError(f"{path} lacks {file.name}; only safetensors weights are read")
    return files


def _weights(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the handle is no mapping
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{file} is a broken safetensors file: {error}") from error
