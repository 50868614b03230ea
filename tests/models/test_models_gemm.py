"""Matrix products: the same numbers through oneDNN and without it, packed or not."""

import pytest
import torch
from kvstore_engine import gemm


@pytest.fixture(params=[True, False], ids=["onednn", "plain"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param and not gemm._ONEDNN:
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(gemm, "_ONEDNN", request.param)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 60, 129])
def test_linear_equals_the_plain_product(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(rows, 63), torch.randn(60, 63), torch.randn(60)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    wanted = (x.double() @ weight.double().T + bias.double()).to(dtype)
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    for its in (weight, gemm.pack(weight), weight.T.contiguous().T):
        ours = gemm.linear(x, its, bias)
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (60, 1000), (300, 64)])
def test_product_equals_the_plain_one_below_and_above_the_threshold(
    rows: int, columns: int
) -> None:
    x, y = torch.randn(rows, 40), torch.randn(columns, 40)
    torch.testing.assert_close(gemm.product(x, y), x @ y.T, rtol=1e-4, atol=1e-4)
