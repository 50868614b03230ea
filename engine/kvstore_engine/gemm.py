"""Matrix products through oneDNN, which uses AVX-512 on every vendor's CPU.

Measured on 2 cores of an AMD EPYC, float32, 512 x 576 x 3072: 490 GFLOP/s, and 42 GB/s of weights
for one row; MKL behind ``torch.nn.functional.linear`` 190 GFLOP/s and 17 GB/s.
"""

import os

# oneDNN and its wrapper in torch compile a kernel for each shape, 0.3 ms and 0.5 MB, and keep the
# latest of them: fewer than their default of 1,024. Read at their first use.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "512")

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_ONEDNN = _HAS_ONEDNN and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Scores from which a kernel for their shape pays, being used once for each layer and KV head.
_WORTH_A_KERNEL = 1 << 15


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias``; ``weight`` ``[out, in]`` may be a transposed view, or packed."""
    if _ONEDNN and x.dtype is torch.float32:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return functional.linear(x, weight, bias)


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x @ y.T`` of shapes that differ from step to step, as in attention."""
    if max(x.numel(), len(x) * len(y)) < _WORTH_A_KERNEL:
        return functional.linear(x, y)
    return linear(x, y)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of ``weight`` in the blocked order that suits this CPU, good for linear() only."""
    if _ONEDNN and weight.dtype is torch.float32:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return packed
    return weight
