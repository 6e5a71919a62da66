"""`torch.ops.llmquant.w4_linear`: the product with a packed weight.

The native library serves the CPU where it was built; everything else is the reference.
"""

import torch
from torch import Tensor

from llmquant.kernels import reference
from llmquant.kernels.cpu import PLANES, Native
from llmquant.kernels.layout import CHUNK, KINDS, PANEL, Panels
from llmquant.native import Library, find_library
from llmquant.scheme import Scheme

_definitions = torch.library.Library("llmquant", "DEF")
_definitions.define(
    "w4_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int rows, int bits, int group_size,"
    " str precision) -> Tensor"
)


@torch.library.impl(_definitions, "w4_linear", "CompositeExplicitAutograd")
def _w4_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    rows: int,
    bits: int,
    group_size: int,
    precision: str,
) -> Tensor:
    scheme, panels = Scheme(bits, group_size, zeros is None), Panels(codes, scales, zeros)
    _check(x, panels, bias, rows, scheme, precision)
    library = find_library()
    if isinstance(library, Library) and x.device.type == "cpu":
        return Native(library).linear(x, panels, bias, rows, scheme, precision)
    return reference.linear(x, panels, bias, rows, scheme)


@torch.library.register_fake("llmquant::w4_linear")
def _w4_linear_fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    rows: int,
    bits: int,
    group_size: int,
    precision: str,
) -> Tensor:
    _check(x, Panels(codes, scales, zeros), bias, rows, Scheme(bits, group_size, zeros is None), precision)
    return x.new_empty((*x.shape[:-1], rows))


def _check(x: Tensor, panels: Panels, bias: Tensor | None, m: int, scheme: Scheme, precision: str) -> None:
    """Native code trusts the sizes that it is given: this is where they are checked."""
    n, count = x.shape[-1], -(-m // PANEL)
    steps = -(-n // CHUNK) * CHUNK * scheme.bits // 32
    grid = (count, scheme.groups(n), PANEL)
    codes, scales, zeros = panels
    _expect("x", x, x.shape, x.is_floating_point())
    _expect("codes", codes, (count, steps, PANEL, 4), codes.dtype == torch.uint8, codes.is_contiguous())
    _expect("scales", scales, grid, scales.dtype in KINDS, scales.is_contiguous())
    if zeros is not None:
        _expect("zeros", zeros, grid, zeros.dtype == torch.uint8, zeros.is_contiguous())
    if bias is not None:
        _expect("bias", bias, (m,), bias.is_floating_point())
    if precision not in PLANES:
        raise ValueError(f"w4_linear: precision is {precision!r}; use one of {', '.join(PLANES)}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], *rest: bool) -> None:
    if tuple(tensor.shape) != tuple(shape) or not all(rest):
        found = f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise ValueError(f"w4_linear: {name} is {found}; expected a contiguous {tuple(shape)}")
