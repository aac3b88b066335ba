"""Linear layers: the product for few rows is the product."""

import pytest
import torch
from torch.nn import functional as F

from longwave.layers.linear import Linear
from longwave.ops.linear import linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 32, 33])
def test_few_rows_give_the_same_product(rows: int, dtype: torch.dtype, bias: bool):
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, 40, generator=generator).to(dtype) for n in (rows, 24))
    shift = torch.randn(24, generator=generator).to(dtype) if bias else None
    right = F.linear(hidden.double(), weight.double(), None if shift is None else shift.double())
    with torch.no_grad():
        found = linear(hidden, weight, shift)
    assert found.dtype == dtype
    assert found.is_contiguous()
    torch.testing.assert_close(
        found.double(),
        right,
        rtol=0.02 if dtype == torch.bfloat16 else 1e-4,
        atol=0.1 if dtype == torch.bfloat16 else 1e-4,
    )


def test_gradients_flow_and_autocast_holds():
    layer, hidden = Linear(8, 6), torch.randn(4, 8)
    layer(hidden).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(hidden).dtype == torch.bfloat16
