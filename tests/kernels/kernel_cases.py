"""Packed weights for the tests of kernels, and the exact product with them."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.kernels.layout import Packed, pack
from llmquant.scheme import Quantized, Scheme

SCHEMES = [Scheme(bits, g, sym) for bits in (4, 8) for g in (32, 128, -1) for sym in (True, False)]


class Weight(NamedTuple):
    """What a kernel is given, and what it stands for."""

    scheme: Scheme
    panels: Packed
    q: Quantized
    real: Tensor  # float64 [m, n]


def weight(scheme: Scheme, m: int, n: int, seed: int = 0) -> Weight:
    """Random codes and zero points; scales are small powers of two, so that the real weight is exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, scheme.max_code + 1, (m, n), dtype=torch.uint8, generator=generator)
    grid = (m, scheme.groups(n))
    scales = 2.0 ** torch.randint(-9, -5, grid, generator=generator)
    zeros = torch.randint(0, scheme.max_code + 1, grid, dtype=torch.uint8, generator=generator)
    if scheme.symmetric:
        zeros = torch.full(grid, scheme.midpoint, dtype=torch.uint8)
    group = torch.arange(n) // scheme.width(n)  # of each column
    real = scales.double()[:, group] * (codes.double() - zeros.double()[:, group])
    q = Quantized(codes, scales, zeros)
    return Weight(scheme, pack(q, scheme), q, real)


def relative_error(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm())
