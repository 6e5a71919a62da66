"""The torch operator."""

import pytest
import torch
from kernel_cases import SCHEMES, Weight, weight

from llmquant.kernels import reference
from llmquant.scheme import Scheme

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int]


def operands(w: Weight, bias: torch.Tensor | None = None) -> Operands:
    return (*w.operands, bias, w.scheme.bits, w.scheme.group_size)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_operator_is_the_reference(scheme: Scheme, tokens: int) -> None:
    w, x, bias = weight(scheme, 8, 160), torch.randn(2, tokens, 160), torch.randn(8)
    y = torch.ops.llmquant.w4_linear(x, *operands(w, bias))
    torch.testing.assert_close(y, reference.linear(x, *w.operands, bias, scheme), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_operator(dtype: torch.dtype) -> None:
    w = weight(Scheme(4, 32, symmetric=False), 8, 64)
    for x in (torch.randn(3, 64, dtype=dtype), torch.randn(2, 1, 64, dtype=dtype)):
        torch.library.opcheck(torch.ops.llmquant.w4_linear.default, (x, *operands(w, torch.randn(8))))
        torch.library.opcheck(torch.ops.llmquant.w4_linear.default, (x, *operands(w)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("packed", lambda x, p, s, z, b: (x, p[:, 1:], s, z, b)),
        ("packed", lambda x, p, s, z, b: (x, p.to(torch.int8), s, z, b)),
        ("packed", lambda x, p, s, z, b: (x, p.T.contiguous().T, s, z, b)),
        ("scales", lambda x, p, s, z, b: (x, p, s[:, :1], z, b)),
        ("scales", lambda x, p, s, z, b: (x, p, s.half(), z, b)),
        ("zeros", lambda x, p, s, z, b: (x, p, s, z[:1], b)),
        ("bias", lambda x, p, s, z, b: (x, p, s, z, b[:1])),
        ("x", lambda x, p, s, z, b: (x.long(), p, s, z, b)),
    ],
)
def test_sizes_are_checked_before_native_code_trusts_them(name: str, change: object) -> None:
    w = weight(Scheme(4, 32, symmetric=False), 8, 64)
    assert callable(change)
    changed = change(torch.randn(2, 64), *w.operands, torch.randn(8))
    with pytest.raises(ValueError, match=f"w4_linear: {name} is "):
        torch.ops.llmquant.w4_linear(*changed, 4, 32)
