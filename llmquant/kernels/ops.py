"""`torch.ops.llmquant.w4_linear`: the product with a packed weight.

The native library serves the CPU where it was built; everything else is the reference.
"""

import torch
from torch import Tensor

from llmquant.kernels import reference
from llmquant.kernels.cpu import Native
from llmquant.native import Library, find_library
from llmquant.scheme import Scheme

_definitions = torch.library.Library("llmquant", "DEF")
_definitions.define(
    "w4_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, int bits, int group_size) -> Tensor"
)


@torch.library.impl(_definitions, "w4_linear", "CompositeExplicitAutograd")
def _w4_linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    scheme = Scheme(bits, group_size, zeros is None)
    _check(x, packed, scales, zeros, bias, scheme)
    library = find_library()
    if isinstance(library, Library) and x.device.type == "cpu":
        return Native(library).linear(x, packed, scales, zeros, bias, scheme)
    return reference.linear(x, packed, scales, zeros, bias, scheme)


@torch.library.register_fake("llmquant::w4_linear")
def _w4_linear_fake(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    _check(x, packed, scales, zeros, bias, Scheme(bits, group_size, zeros is None))
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _check(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, scheme: Scheme
) -> None:
    """Native code trusts the sizes that it is given: this is where they are checked."""
    m, n = packed.shape[0], x.shape[-1]
    grid = (m, scheme.groups(n))
    _expect("x", x, x.shape, x.is_floating_point())
    _expect("packed", packed, (m, -(-n * scheme.bits // 8)), packed.dtype == torch.uint8, packed.is_contiguous())
    _expect("scales", scales, grid, scales.dtype == torch.float32, scales.is_contiguous())
    if zeros is not None:
        _expect("zeros", zeros, grid, zeros.dtype == torch.uint8, zeros.is_contiguous())
    if bias is not None:
        _expect("bias", bias, (m,), bias.is_floating_point())


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], *rest: bool) -> None:
    if tuple(tensor.shape) != tuple(shape) or not all(rest):
        found = f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}"
        raise ValueError(f"w4_linear: {name} is {found}; expected a contiguous {tuple(shape)}")
