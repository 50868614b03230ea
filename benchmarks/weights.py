"""Writes a model as a Hugging Face directory, so that a peer serves the same weights."""

import json
from pathlib import Path

import torch
from kvstore_engine.loader.load import read_model
from kvstore_engine.model_source import find_model
from kvstore_engine.models.config import ModelConfig
from safetensors.torch import save_file


def export(model: str, directory: Path) -> Path:
    """Exports the Llama ``model`` (dequantised to float32) to ``directory``, if it is not there."""
    config_file = directory / "config.json"
    if config_file.exists():
        return directory
    decoder, _ = read_model(find_model(model), torch.float32)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.clone() for name, weight in decoder.targets().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config_file.write_text(json.dumps(_config(decoder.config), indent=2) + "\n")
    return directory


def _config(config: ModelConfig) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context,
        "rope_theta": config.rope.theta,
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "float32",
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
    }
