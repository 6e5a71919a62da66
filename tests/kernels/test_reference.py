"""The definition itself, against loops over single numbers."""

import pytest
import torch
from kernel_cases import SCHEMES, relative_error, weight

from llmquant.kernels import reference
from llmquant.scheme import Scheme


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("n", [128, 150])
def test_product_is_the_definition(scheme: Scheme, n: int) -> None:
    w = weight(scheme, 5, n)
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(1))
    bias = torch.arange(5.0)
    y = reference.linear(x, w.panels, bias, 5, scheme)
    assert y.shape == (2, 3, 5)
    assert relative_error(y, x.double() @ w.real.T + bias) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_only_at_the_door(dtype: torch.dtype) -> None:
    w = weight(Scheme(4, 32), 8, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = reference.linear(x, w.panels, None, 8, w.scheme)
    assert y.dtype == dtype
    assert torch.equal(y, reference.linear(x.float(), w.panels, None, 8, w.scheme).to(dtype))
