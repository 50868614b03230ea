"""Parts that decoders share: projections, norms, rotary embedding, the gated MLP."""

import math

import torch
from torch import nn
from torch.nn import functional

from kvstore_engine.gemm import linear, pack
from kvstore_engine.models.config import ModelConfig, RopeConfig


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised weight; inference never needs its gradient."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Projection(nn.Module):
    """``x @ weight.T + bias`` whose weight may be several projections stacked, for one GEMM."""

    def __init__(self, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(outputs, inputs, dtype=dtype)
        self.bias = empty_parameter(outputs, dtype=dtype) if bias else None

        self.packed: torch.Tensor | None = None

    def pack(self) -> None:
        """Puts the loaded weight into its fastest order; ``weight`` is empty from then on."""
        self.packed = pack(self.weight.data)
        self.weight.data = torch.empty(0, dtype=self.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight if self.packed is None else self.packed, self.bias)


class RmsNorm(nn.Module):
    """Root mean square norm over the last dimension."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = empty_parameter(size, dtype=dtype)
        self.shape = [size]
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.shape, self.weight, self.eps)


class GatedMlp(nn.Module):
    """``down(silu(gate(x)) * up(x))`` with gate and up in one GEMM."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = Projection(config.hidden_size, 2 * config.intermediate_size, False, dtype)
        self.down = Projection(config.intermediate_size, config.hidden_size, False, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(functional.silu(gate).mul_(up))  # type: ignore[no-any-return]


class Rotary(nn.Module):
    """Rotary position embedding, halves rotated against each other (Su et al., 2021)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        angles = torch.outer(
            torch.arange(config.max_context, dtype=torch.float32),
            inverse_frequencies(config.rope, config.head_dim),
        )
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[T, 1, head_dim/2]`` of ``positions`` ``[T]``."""
        cos, sin = self.get_buffer("cos"), self.get_buffer("sin")
        return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """``x`` ``[T, heads, head_dim]`` rotated by the cosines and sines of its positions."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype)
    half = x.shape[-1] // 2
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians a token for each of the ``head_dim / 2`` pairs, scaled as ``rope`` says."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "factors":
        return frequencies / torch.tensor(rope.factors)
    if rope.scaling == "llama3":
        return _llama3_frequencies(frequencies, rope)
    return frequencies


def _llama3_frequencies(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long waves stretched by ``factor``, short ones kept, a ramp in between (Llama 3.1)."""
    turns = rope.original_context * frequencies / (2 * math.pi)
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = ramp.clamp(0, 1)
    return frequencies * (keep + (1 - keep) / rope.factor)
