"""The contract of a decoder, and what all of them do alike."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from kvstore_engine.attention import AttentionPlan
from kvstore_engine.gemm import linear
from kvstore_engine.model_source import ModelLoadError
from kvstore_engine.models.config import ModelConfig
from kvstore_engine.models.layers import GatedMlp, Projection, RmsNorm, Rotary, empty_parameter

Rotation = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """B sequences whose new tokens lie one behind the other in a step's token list.

    Sequence i computes tokens ``query_starts[i] : query_starts[i+1]`` and has ``context_lens[i]``
    tokens before them in the pages of ``page_tables[i]`` (int64), which has room for both. A
    sequence is not in a batch twice.
    """

    query_starts: list[int]
    context_lens: list[int]
    page_tables: list[torch.Tensor]
    pages: torch.Tensor


class AttentionBlock(nn.Module, ABC):
    """Self-attention of one layer, with query, key and value in one projection."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        heads = config.num_heads + 2 * config.num_kv_heads
        bias = config.attention_bias
        self.qkv = Projection(config.hidden_size, heads * config.head_dim, bias, dtype)
        self.output = Projection(
            config.num_heads * config.head_dim, config.hidden_size, bias, dtype
        )

    def forward(self, x: torch.Tensor, rotation: Rotation, plan: AttentionPlan) -> torch.Tensor:
        config = self.config
        qkv = self.qkv(x).view(len(x), -1, config.head_dim)
        rotated = self.position(qkv[:, : -config.num_kv_heads], rotation)
        queries = rotated[:, : config.num_heads]
        keys = rotated[:, config.num_heads :]
        attended = plan.attend(self.layer, queries, keys, qkv[:, -config.num_kv_heads :])
        return self.output(attended)  # type: ignore[no-any-return]

    @abstractmethod
    def position(self, queries_keys: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """Queries and keys ``[T, heads + kv_heads, head_dim]`` with their positions in them."""

    def targets(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights by their Hugging Face names, as views into the stacked ones."""
        config = self.config
        query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            stacked = getattr(self.qkv, kind)
            yield f"q_proj.{kind}", stacked[:query]
            yield f"k_proj.{kind}", stacked[query : query + key]
            yield f"v_proj.{kind}", stacked[query + key :]
            yield f"o_proj.{kind}", getattr(self.output, kind)


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, attention: AttentionBlock, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.hidden_size, config.rms_eps, dtype)
        self.attention = attention
        self.mlp_norm = RmsNorm(config.hidden_size, config.rms_eps, dtype)
        self.mlp = GatedMlp(config, dtype)

    def forward(self, x: torch.Tensor, rotation: Rotation, plan: AttentionPlan) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, plan)
        return x.add_(self.mlp(self.mlp_norm(x)))

    def targets(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights by their Hugging Face names."""
        yield "input_layernorm.weight", self.attention_norm.weight
        yield "post_attention_layernorm.weight", self.mlp_norm.weight
        for name, target in self.attention.targets():
            yield f"self_attn.{name}", target
        gate, up = self.mlp.gate_up.weight.chunk(2)
        yield "mlp.gate_proj.weight", gate
        yield "mlp.up_proj.weight", up
        yield "mlp.down_proj.weight", self.mlp.down.weight


class Decoder(nn.Module, ABC):
    """A decoder-only transformer over paged KV.

    ``forward`` writes the KV of the new tokens into the batch's pages and returns the hidden
    states after the last norm; ``logits`` turns the rows that are wanted into logits. Results do
    not depend on how a prompt is cut into chunks, nor on what else is in the batch, beyond the
    rounding of float32.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embedding = empty_parameter(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(
            DecoderLayer(config, self.make_attention(layer), dtype)
            for layer in range(config.num_layers)
        )
        self.norm = RmsNorm(config.hidden_size, config.rms_eps, dtype)
        self.head = (
            self.embedding
            if config.tie_embeddings
            else empty_parameter(config.vocab_size, config.hidden_size, dtype=dtype)
        )
        self.rotary = Rotary(config, dtype)

    @abstractmethod
    def make_attention(self, layer: int) -> AttentionBlock:
        """The self-attention of ``layer``."""

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, batch: AttentionBatch
    ) -> torch.Tensor:
        """Hidden states ``[T, hidden]`` of ``tokens`` ``[T]`` at ``positions`` ``[T]`` (int64)."""
        plan = AttentionPlan(batch.query_starts, batch.context_lens, batch.page_tables, batch.pages)
        rotation = self.rotary.at(positions)
        x = functional.embedding(tokens, self.embedding)
        for layer in self.layers:
            x = layer(x, rotation, plan)
        return self.norm(x)  # type: ignore[no-any-return]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[R, vocab]`` of hidden states ``[R, hidden]``."""
        return linear(hidden, self.head)

    def pack(self) -> None:
        """Makes the loaded weights fast to use; targets() and load() are over then."""
        for module in self.modules():
            if isinstance(module, Projection):
                module.pack()

    def targets(self) -> dict[str, torch.Tensor]:
        """Every weight by its Hugging Face name: writable views of the storage."""
        found = {"model.embed_tokens.weight": self.embedding.data}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            for name, target in layer.targets():
                found[f"model.layers.{i}.{name}"] = target.data
        found["model.norm.weight"] = self.norm.weight.data
        if not self.config.tie_embeddings:
            found["lm_head.weight"] = self.head.data
        return found

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copies ``weights`` (Hugging Face names) in; ModelLoadError unless they fit exactly."""
        missing = self.targets()
        for name, weight in weights:
            target = missing.pop(name, None)
            if target is None:
                if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):
                    continue
                raise ModelLoadError(f"the model has an unexpected or repeated tensor {name}")
            if target.shape != weight.shape:
                raise ModelLoadError(
                    f"tensor {name} has shape {tuple(weight.shape)}; "
                    f"the model's configuration says {tuple(target.shape)}"
                )
            target.copy_(weight)
        if missing:
            some = ", ".join(sorted(missing)[:3])
            raise ModelLoadError(f"the model lacks {len(missing)} tensors, such as {some}")
