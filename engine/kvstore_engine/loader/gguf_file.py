"""Models in GGUF files: the header as a ModelConfig, the tensors dequantised."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch

from kvstore_engine.gguf_fields import GgufFields, open_gguf
from kvstore_engine.loader.fingerprint import fingerprint_files
from kvstore_engine.model_files import printable
from kvstore_engine.model_source import ModelLoadError
from kvstore_engine.models.base import Decoder
from kvstore_engine.models.config import ModelConfig, RopeConfig
from kvstore_engine.models.registry import build_decoder

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Holds divisors of the rotary frequencies, no weight.
_ROPE_FACTORS = "rope_freqs.weight"


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Decoder, str]:
    """The decoder in a GGUF file, and the file's fingerprint."""
    reader = open_gguf(path)
    config = gguf_config(reader, path)
    model = build_decoder(config, dtype)
    model.load(gguf_weights(reader, config))
    return model, fingerprint_files([path])


def gguf_config(reader: Any, path: Path) -> ModelConfig:
    """The header of an open GGUF file as a ModelConfig; ``path`` is for messages."""
    fields = GgufFields(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = fields.text("general.architecture")
    heads = fields.integer("{arch}.attention.head_count")
    hidden = fields.integer("{arch}.embedding_length")
    head_dim = fields.integer("{arch}.attention.key_length", hidden // max(heads, 1))
    if fields.integer("{arch}.rope.dimension_count", head_dim) != head_dim:
        raise ModelLoadError(f"{path}: rotary embedding of a part of the head is not supported")
    if "token_embd.weight" not in tensors:
        raise ModelLoadError(f"{path}: the file has no token embedding, so it is no whole model")
    ends = (fields.token_id("eos"), fields.token_id("eot"))
    return ModelConfig(
        architecture=architecture,
        name=_name(fields),
        hidden_size=hidden,
        num_layers=fields.integer("{arch}.block_count"),
        num_heads=heads,
        num_kv_heads=fields.integer("{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("{arch}.feed_forward_length"),
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        rope=_rope(fields, tensors.get(_ROPE_FACTORS), path),
        rms_eps=fields.number("{arch}.attention.layer_norm_rms_epsilon", 1e-5),
        max_context=fields.integer("{arch}.context_length"),
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        tie_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        bos_token_id=fields.token_id("bos"),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def _name(fields: GgufFields) -> str:
    try:
        return printable(fields.value("general.name"))
    except UnicodeDecodeError:
        return ""


def _rope(fields: GgufFields, factors: Any, path: Path) -> RopeConfig:
    theta = fields.number("{arch}.rope.freq_base", 10000.0)
    if factors is not None:
        divisors = tuple(float(value) for value in _dequantise(factors).flatten())
        return RopeConfig(theta=theta, scaling="factors", factors=divisors)
    scaling = fields.text("{arch}.rope.scaling.type", "none")
    if scaling == "linear":
        factor = fields.number("{arch}.rope.scaling.factor", 1.0)
        return RopeConfig(theta=theta, scaling="linear", factor=factor)
    if scaling != "none":
        raise ModelLoadError(f"{path}: rope scaling {scaling!r} is not supported")
    return RopeConfig(theta=theta)


def gguf_weights(reader: Any, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, dequantised to float32, under its Hugging Face name and in its row order."""
    for tensor in reader.tensors:
        if tensor.name == _ROPE_FACTORS:
            continue
        weight = _dequantise(tensor)
        name, kind = _hugging_face_name(tensor.name)
        if config.architecture == "llama" and "self_attn.q_proj" in name:
            weight = _unpermute(weight, config.num_heads)
        if config.architecture == "llama" and "self_attn.k_proj" in name:
            weight = _unpermute(weight, config.num_kv_heads)
        yield f"{name}.{kind}", weight


def _dequantise(tensor: Any) -> torch.Tensor:
    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise ModelLoadError(f"tensor {tensor.name} cannot be dequantised: {error}") from error
    return torch.tensor(values, dtype=torch.float32)


def _hugging_face_name(name: str) -> tuple[str, str]:
    """Name without its last part, and that part: ``weight`` or ``bias``."""
    stem, _, kind = name.rpartition(".")
    if stem in _NAMES:
        return _NAMES[stem], kind
    prefix, _, rest = stem.partition(".")
    index, _, part = rest.partition(".")
    if prefix == "blk" and part in _LAYER_NAMES:
        return f"model.layers.{index}.{_LAYER_NAMES[part]}", kind
    raise ModelLoadError(f"the file has a tensor {name} that no supported model has")


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in halves again: llama files interleave the halves that rope rotates."""
    paired = weight.view(heads, -1, 2, *weight.shape[1:])
    return paired.transpose(1, 2).reshape(weight.shape)
