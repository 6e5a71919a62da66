"""Scales and zero points: round-to-nearest grids and the weighted search for better ones.

Every scale that leaves this file is exact in both fp16 and bf16, because servers copy scales into
the model's dtype and would otherwise silently change the weights that the solver chose codes for.

Inside the solvers a grid stands transposed, like the weight: scales and zeros fp32 [G, m].
"""

import torch
from torch import Tensor

from llmquant.errors import NumericsError, RecipeError
from llmquant.scheme import MAX_SCALE, MIN_SCALE, Quantized, Scheme

SEARCH_CHUNK = 1 << 18  # weights per pass of the search: the working set stays in cache

# What the search tries: each end of the group's range shrunk to these fractions of itself. A symmetric grid keeps the
# ends together and may stand on its head (a negative scale), so that the longer side has the one step more.
SYMMETRIC_SHRINK = torch.linspace(1.0, 0.55, 24)
ASYMMETRIC_SHRINK = torch.linspace(1.0, 0.6, 6)


def representable(scales: Tensor) -> Tensor:
    """Round to eight significant bits inside the normal range of fp16, of either sign: exact in fp16 and in bf16."""
    return scales.abs().bfloat16().float().clamp_(MIN_SCALE, MAX_SCALE).copysign_(scales)


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


def check_range(W: Tensor, scheme: Scheme) -> None:
    """Raise NumericsError if a weight is so large that its scale leaves the range of fp16."""
    largest = float(W.abs().max())
    steps = scheme.midpoint - 1 if scheme.symmetric else scheme.max_code
    if largest / steps > MAX_SCALE:
        raise NumericsError(f"a weight of magnitude {largest:.3g} needs a scale above fp16")


def minmax_grid(W: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The grid that spans each group's range: scales fp32 [m, G], zeros uint8 [m, G].

    Raises:
        NumericsError: a weight is so large that its scale leaves the range of fp16.
    """
    check_range(W, scheme)
    low, high = _range(grouped(W, scheme), -1)
    scales, zeros = grid_over(low, high, torch.ones(3), scheme)
    return scales, zeros.to(torch.uint8)


def candidates(scheme: Scheme) -> Tensor:
    """The grids that a search tries, fp32 [C, 3]: shrinkage of the low end, of the high end, sign of the scale.

    The first is the whole range.
    """
    if scheme.symmetric:
        rows = [(shrink, shrink, sign) for shrink in SYMMETRIC_SHRINK.tolist() for sign in (1.0, -1.0)]
    else:
        ends = ASYMMETRIC_SHRINK.tolist()
        rows = [(low, high, 1.0) for low in ends for high in ends]
    return torch.tensor(rows)


def grid_over(low: Tensor, high: Tensor, candidate: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The grid over a range [low, high] of any shape, low <= 0 <= high, shrunk as one of `candidates`; in floats."""
    shrink_low, shrink_high, sign = candidate.tolist()
    low, high = low * shrink_low, high * shrink_high
    if not scheme.symmetric:
        scales = (high - low) * (1.0 / scheme.max_code)
        zeros = torch.round(-low / scales.clamp(min=MIN_SCALE)).clamp_(0, scheme.max_code)
        return representable(scales), zeros
    longer, shorter = (-low, high) if sign > 0 else (high, -low)
    scales = torch.maximum(longer * (1.0 / scheme.midpoint), shorter * (1.0 / (scheme.midpoint - 1)))
    return representable(scales) * sign, torch.full_like(scales, scheme.midpoint)


def search_grid(W: Tensor, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Per group, the grid that minimises the weighted squared rounding error.

        argmin over `candidates` of  sum_j weight_j (W_j - Q(W_j))**2

    With `weight` = diag(H) this is the diagonal of the layer's output error (known from importance-matrix quantizers,
    and AWQ's clip search where only one group's range is cut). Returns scales fp32 [m, G] and zeros uint8 [m, G].

    Args:
        W: fp32 [m, n].
        weight: fp32 [n], non-negative.
    """
    check_range(W, scheme)
    rows = max(1, SEARCH_CHUNK // W.shape[1])
    parts = [_search_rows(block, weight, scheme) for block in W.split(rows)]
    return torch.cat([s for s, _ in parts]), torch.cat([z for _, z in parts])


def _search_rows(W: Tensor, weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    groups = grouped(W, scheme)  # [r, G, g]
    weight = weight.reshape(1, *groups.shape[1:])
    low, high = _range(groups, -1)
    best = torch.full_like(low, torch.inf)
    best_scales, best_zeros = torch.empty_like(low), torch.empty_like(low)
    for candidate in candidates(scheme):
        scales, zeros = grid_over(low, high, candidate, scheme)
        codes = round_to(groups, scales.unsqueeze(-1), zeros.unsqueeze(-1), scheme)
        error = value_of(codes, scales.unsqueeze(-1), zeros.unsqueeze(-1)).sub_(groups).square_().mul_(weight).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_scales = torch.where(better, scales, best_scales)
        best_zeros = torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros.to(torch.uint8)


def encode(W: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Quantized:
    """Round `W` fp32 [m, n] to the nearest codes of a given grid."""
    codes = round_to(grouped(W, scheme), scales.unsqueeze(-1), zeros.unsqueeze(-1).float(), scheme)
    return Quantized(codes.to(torch.uint8).reshape(W.shape), scales, zeros)


def round_to(W: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> Tensor:
    """The nearest codes, as floats."""
    return torch.div(W, scales).round_().add_(zeros).clamp_(0, scheme.max_code)


def value_of(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """What codes (floats) stand for."""
    return (codes - zeros).mul_(scales)


def _range(groups: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Each group's minimum and maximum, both widened to contain zero."""
    return groups.amin(dim).clamp_(max=0.0), groups.amax(dim).clamp_(min=0.0)
