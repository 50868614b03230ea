"""Runs decoders over NaN-filled pages in any cut, and builds their transformers twins."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from kvstore_engine.models import AttentionBatch, Decoder, ModelConfig, build_decoder
from kvstore_engine.pages import allocate_pages
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """``max |a - b| / max |b|``."""
    return float((ours - reference).abs().max() / reference.abs().max())


@dataclass
class Runner:
    """Sequences over one page pool that starts full of NaN; pages are given out in random order."""

    model: Decoder
    page_tokens: int = 16
    num_pages: int = 64
    pages: torch.Tensor = field(init=False)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.pages = allocate_pages(self.model.config, self.num_pages, self.page_tokens)
        self.pages.fill_(torch.nan)
        self.free = torch.randperm(self.num_pages).tolist()

    def sequence(self) -> "Sequence_":
        return Sequence_(self)

    def step(self, work: Sequence[tuple["Sequence_", torch.Tensor]]) -> torch.Tensor:
        """Logits of all new tokens of ``work``: (sequence, its next tokens)."""
        starts = [0]
        for sequence, tokens in work:
            starts.append(starts[-1] + len(tokens))
            sequence.reserve(sequence.length + len(tokens))
        batch = AttentionBatch(
            query_starts=starts,
            context_lens=[sequence.length for sequence, _ in work],
            page_tables=[torch.tensor(sequence.table) for sequence, _ in work],
            pages=self.pages,
        )
        positions = [torch.arange(s.length, s.length + len(tokens)) for s, tokens in work]
        with torch.inference_mode():
            hidden = self.model(torch.cat([t for _, t in work]), torch.cat(positions), batch)
            logits = self.model.logits(hidden)
        for sequence, tokens in work:
            sequence.length += len(tokens)
        return logits


@dataclass
class Sequence_:  # noqa: N801 - the name without underscore is typing's
    """A sequence's pages and how many of its tokens are in them."""

    runner: Runner
    length: int = 0
    table: list[int] = field(default_factory=list)

    def reserve(self, tokens: int) -> None:
        while len(self.table) * self.runner.page_tokens < tokens:
            self.table.append(self.runner.free.pop())

    def run(self, tokens: torch.Tensor, cuts: Sequence[int] = ()) -> torch.Tensor:
        """Logits of ``tokens`` computed alone, cut at the given places."""
        return torch.cat(
            [self.runner.step([(self, part)]) for part in tokens.tensor_split(tuple(cuts))]
        )


def random_decoder(config: ModelConfig) -> Decoder:
    """A decoder with random weights, unpacked, so that its targets can be read."""
    model = build_decoder(config)
    for name, target in model.targets().items():
        if target.dim() == 1 and "bias" not in name:
            target.uniform_(0.5, 1.5)
        else:
            target.normal_(std=1.0 if "embed" in name else 1.5 * target.shape[-1] ** -0.5)
    return model.eval()


def twin(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Any:
    """The model of transformers with the same weights."""
    model = empty_twin(config)
    load_twin(model, weights)
    return model.eval()


def load_twin(model: Any, weights: Any) -> None:
    """All weights of a twin, but for a head that is the embedding."""
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    assert left.missing_keys in ([], ["lm_head.weight"])


def empty_twin(config: ModelConfig) -> Any:
    """The model of transformers of the same shape."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope.theta}
    if config.rope.scaling in ("linear", "llama3"):
        rope |= {"rope_type": config.rope.scaling, "factor": config.rope.factor}
    if config.rope.scaling == "llama3":
        rope |= {
            "low_freq_factor": config.rope.low_freq_factor,
            "high_freq_factor": config.rope.high_freq_factor,
            "original_max_position_embeddings": config.rope.original_context,
        }
    settings = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_eps,
        "max_position_embeddings": config.max_context,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": None,
    }
    if config.architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**settings))
    return LlamaForCausalLM(LlamaConfig(**settings))


def twin_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits ``[T, vocab]`` of the transformers model."""
    with torch.inference_mode():
        logits: torch.Tensor = model(tokens[None]).logits[0]
    return logits
