"""Scales and zero points: round-to-nearest grids and the weighted search for better ones.

Every scale that leaves this file is exact in both fp16 and bf16, because servers copy scales into
the model's dtype and would otherwise silently change the weights that the solver chose codes for.
"""

import torch
from torch import Tensor

from llmquant.errors import NumericsError, RecipeError
from llmquant.scheme import Quantized, Scheme

MIN_SCALE = 2.0**-14  # smallest normal fp16
MAX_SCALE = 65280.0  # largest value exact in both fp16 and bf16
SHRINK = torch.linspace(1.0, 0.3, 71)  # fractions of the min-max range that the search tries
SEARCH_CHUNK = 1 << 18  # weights per pass of the search: the working set stays in cache


def representable(scales: Tensor) -> Tensor:
    """Round to eight significant bits inside the normal range of fp16: exact in fp16 and in bf16."""
    return scales.bfloat16().float().clamp_(MIN_SCALE, MAX_SCALE)


def grouped(W: Tensor, scheme: Scheme) -> Tensor:
    """View `W` [m, n] as [m, G, g].

    Raises:
        RecipeError: the group size does not divide the columns.
    """
    m, n = W.shape
    width = scheme.width(n)
    if n % width:
        raise RecipeError(f"group_size: {width} does not divide {n} columns; use 32, 64, 128 or -1")
    return W.reshape(m, n // width, width)


def minmax_grid(W: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The grid that spans each group's range: scales fp32 [m, G], zeros uint8 [m, G].

    Raises:
        NumericsError: a weight is so large that its scale leaves the range of fp16.
    """
    low, high = _range(grouped(W, scheme))
    return _grid(low, high, scheme)


def search_grid(W: Tensor, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Per group, the grid that minimises the weighted squared rounding error.

        argmin over the shrunk ranges of  sum_j weight_j (W_j - Q(W_j))**2

    With `weight` = diag(H) this is the diagonal of the layer's output error (algorithm known from
    importance-matrix quantizers). Returns scales fp32 [m, G] and zeros uint8 [m, G].

    Args:
        W: fp32 [m, n].
        weight: fp32 [n], non-negative.
    """
    rows = max(1, SEARCH_CHUNK // W.shape[1])
    parts = [_search_rows(block, weight, scheme) for block in W.split(rows)]
    return torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])


def _search_rows(W: Tensor, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    groups = grouped(W, scheme)  # [r, G, g]
    weight = weight.reshape(1, *groups.shape[1:])
    low, high = _range(groups)
    best_scales, best_zeros = _grid(low, high, scheme)
    best = _error(groups, weight, best_scales, best_zeros, scheme)
    for shrink in SHRINK[1:].tolist():
        scales, zeros = _grid(low * shrink, high * shrink, scheme)
        error = _error(groups, weight, scales, zeros, scheme)
        better = error < best
        best = torch.where(better, error, best)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def encode(W: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Quantized:
    """Round `W` fp32 [m, n] to the nearest codes of a given grid."""
    codes = _round(grouped(W, scheme), scales, zeros, scheme).to(torch.uint8)
    return Quantized(codes.reshape(W.shape), scales, zeros)


def _range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Each group's minimum and maximum, both widened to contain zero: [m, G] each."""
    return groups.amin(-1).clamp_(max=0.0), groups.amax(-1).clamp_(min=0.0)


def _grid(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    if scheme.symmetric:
        scales = torch.maximum(high / (scheme.midpoint - 1), -low / scheme.midpoint)
        zeros = torch.full_like(scales, scheme.midpoint)
    else:
        scales = (high - low) / scheme.max_code
        zeros = torch.round(-low / scales.clamp(min=MIN_SCALE)).clamp_(0, scheme.max_code)
    if float(scales.max()) > MAX_SCALE:
        raise NumericsError(
            f"a weight of magnitude {float(torch.maximum(high, -low).max()):.3g} needs a scale above fp16"
        )
    return representable(scales), zeros.to(torch.uint8)


def _round(groups: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """Codes as floats, [m, G, g]."""
    zeros = zeros.unsqueeze(-1).float()
    return torch.div(groups, scales.unsqueeze(-1)).round_().add_(zeros).clamp_(0, scheme.max_code)


def _error(groups: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """Weighted squared error of each group, [m, G]."""
    rounded = _round(groups, scales, zeros, scheme).sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
    return rounded.sub_(groups).square_().mul_(weight).sum(-1)
