"""The torch operator."""

import pytest
import torch
from kernel_cases import SCHEMES, Weight, relative_error, weight

from llmquant.kernels import ops, reference  # noqa: F401  (ops registers the operator)
from llmquant.scheme import Scheme

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int, int, str]


def operands(w: Weight, bias: torch.Tensor | None = None, precision: str = "exact") -> Operands:
    return (*w.panels, bias, len(w.real), w.scheme.bits, w.scheme.group_size, precision)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_operator_is_the_reference(scheme: Scheme, tokens: int) -> None:
    w, x, bias = weight(scheme, 8, 160), torch.randn(2, tokens, 160), torch.randn(8)
    y = torch.ops.llmquant.w4_linear(x, *operands(w, bias))
    expected = reference.linear(x, w.panels, bias, 8, scheme)
    assert relative_error(y, expected.double()) < 1e-3


@pytest.mark.parametrize("precision", ["exact", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_operator(dtype: torch.dtype, precision: str) -> None:
    w = weight(Scheme(4, 32, symmetric=False), 8, 64)
    for x in (torch.randn(3, 64, dtype=dtype), torch.randn(2, 1, 64, dtype=dtype)):
        for bias in (torch.randn(8), None):
            torch.library.opcheck(torch.ops.llmquant.w4_linear.default, (x, *operands(w, bias, precision)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("codes", lambda x, c, s, z, b: (x, c[:, 1:], s, z, b)),
        ("codes", lambda x, c, s, z, b: (x, c.to(torch.int8), s, z, b)),
        ("codes", lambda x, c, s, z, b: (x, c.transpose(1, 2).contiguous().transpose(1, 2), s, z, b)),
        ("scales", lambda x, c, s, z, b: (x, c, s[:, :1], z, b)),
        ("scales", lambda x, c, s, z, b: (x, c, s.double(), z, b)),
        ("zeros", lambda x, c, s, z, b: (x, c, s, z[:, :1], b)),
        ("bias", lambda x, c, s, z, b: (x, c, s, z, b[:1])),
        ("x", lambda x, c, s, z, b: (x.long(), c, s, z, b)),
    ],
)
def test_sizes_are_checked_before_native_code_trusts_them(name: str, change: object) -> None:
    w = weight(Scheme(4, 32, symmetric=False), 8, 64)
    assert callable(change)
    changed = change(torch.randn(2, 64), *w.panels, torch.randn(8))
    with pytest.raises(ValueError, match=f"w4_linear: {name} is "):
        torch.ops.llmquant.w4_linear(*changed, 8, 4, 32, "exact")


def test_an_unknown_precision_is_refused() -> None:
    w = weight(Scheme(4, 32), 8, 64)
    with pytest.raises(ValueError, match="precision is 'half'; use one of int8, exact"):
        torch.ops.llmquant.w4_linear(torch.randn(1, 64), *operands(w, None, "half"))
