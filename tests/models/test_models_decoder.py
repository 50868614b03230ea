"""The decoders against transformers with the same weights, in any cut and any company."""

import dataclasses

import pytest
import torch
from kvstore_engine.loader import load_model
from kvstore_engine.model_source import ModelLoadError
from kvstore_engine.models import Decoder, ModelConfig, RopeConfig, build_decoder
from kvstore_engine.pages import allocate_pages, page_bytes

from tests.models.model_harness import Runner, random_decoder, relative_error, twin, twin_logits

TOLERANCE = 1e-3

LLAMA = ModelConfig(
    architecture="llama",
    name="random",
    hidden_size=96,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=160,
    vocab_size=300,
    rope=RopeConfig(theta=10000.0),
    rms_eps=1e-5,
    max_context=1024,
)
QWEN3 = dataclasses.replace(
    LLAMA, architecture="qwen3", head_dim=32, num_heads=8, num_kv_heads=4, qk_norm=True
)
LLAMA3_ROPE = RopeConfig(
    theta=500000.0,
    scaling="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_context=128,
)
CONFIGS = {
    "llama": LLAMA,
    "llama-tied-bias": dataclasses.replace(LLAMA, tie_embeddings=True, attention_bias=True),
    "llama3-rope": dataclasses.replace(LLAMA, rope=LLAMA3_ROPE),
    "linear-rope": dataclasses.replace(LLAMA, rope=RopeConfig(scaling="linear", factor=4.0)),
    "multi-query": dataclasses.replace(LLAMA, num_kv_heads=1),
    "qwen3": QWEN3,
    "qwen3-tied": dataclasses.replace(QWEN3, tie_embeddings=True),
}
CUTS = {"whole": [], "odd": [1, 8, 71, 72, 135], "pages": [16, 32, 160], "ones": range(1, 40)}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[Decoder, torch.Tensor, torch.Tensor]:
    """A packed decoder, some tokens, and the logits that transformers has for them."""
    config = CONFIGS[request.param]
    torch.manual_seed(7)
    model = random_decoder(config)
    reference = twin(config, {name: t.clone() for name, t in model.targets().items()})
    model.pack()
    tokens = torch.randint(0, config.vocab_size, (203,))
    return model, tokens, twin_logits(reference, tokens)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_I12_logits_agree_with_transformers_in_any_chunks(
    pair: tuple[Decoder, torch.Tensor, torch.Tensor], cuts: list[int]
) -> None:
    model, tokens, reference = pair
    ours = Runner(model).sequence().run(tokens, cuts)
    assert relative_error(ours, reference) < TOLERANCE


def test_I12_logits_agree_with_transformers_in_a_batch(
    pair: tuple[Decoder, torch.Tensor, torch.Tensor],
) -> None:
    model, tokens, reference = pair
    runner = Runner(model)
    long, short, one = runner.sequence(), runner.sequence(), runner.sequence()
    runner.step([(long, tokens[:150]), (one, tokens[:1])])
    mixed = runner.step([(short, tokens[:33]), (long, tokens[150:151]), (one, tokens[1:2])])
    assert relative_error(mixed[:33], reference[:33]) < TOLERANCE
    assert relative_error(mixed[33], reference[150]) < TOLERANCE
    assert relative_error(mixed[34], reference[1]) < TOLERANCE
    for i in range(20):
        work = [(one, tokens[2 + i :][:1]), (short, tokens[33 + i :][:1])]
        decoded = runner.step([*work, (long, tokens[151 + i :][:1])])
        wanted = reference[[2 + i, 33 + i, 151 + i]]
        assert relative_error(decoded, wanted) < TOLERANCE


@pytest.mark.parametrize("name", ["tiny-random", "tiny-random-qwen3"])
def test_I12_wrong_kv_changes_the_tokens_of_tiny_models(name: str) -> None:
    model = load_model(name).model
    runner = Runner(model)
    tokens = torch.randint(0, 256, (200,))
    sequence = runner.sequence()
    right = sequence.run(tokens)[184:].argmax(-1)
    changed = 0
    for page in sequence.table[:11]:
        kept = runner.pages[page].clone()
        runner.pages[page].normal_()
        sequence.length = 184
        changed += int((sequence.run(tokens[184:]).argmax(-1) != right).any())
        runner.pages[page] = kept
    assert changed >= 5


def test_I12_tiny_models_are_the_same_in_every_process() -> None:
    first, second = load_model("tiny-random"), load_model("tiny-random")
    other = load_model("tiny-random-qwen3")
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert first.config.vocab_size == 260
    assert first.config.max_context >= 2048


def test_reduced_precision_stays_near_float32() -> None:
    tokens = torch.randint(0, 256, (90,))
    wide = load_model("tiny-random").model
    narrow = load_model("tiny-random", dtype="bfloat16").model
    reference = Runner(wide).sequence().run(tokens)
    runner = Runner(narrow)
    runner.pages = runner.pages.to(torch.bfloat16)
    ours = runner.sequence().run(tokens, [50, 88, 89])
    assert ours.dtype is torch.bfloat16
    assert relative_error(ours.float(), reference) < 0.1


def test_load_refuses_weights_that_do_not_fit() -> None:
    model = build_decoder(LLAMA)
    weights = {name: target.clone() for name, target in model.targets().items()}
    norm = weights.pop("model.norm.weight")
    with pytest.raises(ModelLoadError, match=r"lacks 1 tensors, such as model\.norm\.weight"):
        model.load(weights.items())
    weights["model.norm.weight"] = norm[:5]
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight has shape \(5,\)"):
        model.load(weights.items())
    with pytest.raises(ModelLoadError, match="unexpected or repeated tensor model"):
        model.load([("model.mtp", norm)])


def test_config_refuses_shapes_that_cannot_work() -> None:
    for change in ({"num_kv_heads": 4}, {"head_dim": 15}, {"num_layers": 0}):
        with pytest.raises(ModelLoadError):
            dataclasses.replace(LLAMA, **change)  # type: ignore[arg-type]
    with pytest.raises(ModelLoadError, match="rope factors"):
        dataclasses.replace(LLAMA, rope=RopeConfig(scaling="factors", factors=(1.0,)))
    with pytest.raises(ModelLoadError, match="architecture 'gpt2' is not supported"):
        build_decoder(dataclasses.replace(LLAMA, architecture="gpt2"))


def test_page_bytes_are_those_of_a_page() -> None:
    pages = allocate_pages(QWEN3, 3, 16, torch.bfloat16)
    assert page_bytes(QWEN3, 16, torch.bfloat16) == pages[0].nbytes
    assert pages.shape == (3, 4, 3, 2, 16, 32)
    assert pages.is_contiguous()


def test_rope_text_differs_whenever_rotations_do() -> None:
    ropes = [
        RopeConfig(),
        RopeConfig(theta=5e5),
        RopeConfig(scaling="linear", factor=2.0),
        LLAMA3_ROPE,
        dataclasses.replace(LLAMA3_ROPE, original_context=256),
        RopeConfig(scaling="factors", factors=(1.0, 2.0)),
    ]
    assert len({rope.canonical for rope in ropes}) == len(ropes)
