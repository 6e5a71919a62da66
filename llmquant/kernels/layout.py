"""How a weight stands in memory: the three parts of every layout, and the one of the CPU kernels, panels, which is the
definition of what `csrc/cpu/linear.h` describes.

Packed of 16 rows, each a sequence of 64-byte steps with 4 bytes to a row; so a step is a vector that is multiplied as
it is loaded, and a thread reads one stream of memory.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llmquant.scheme import Quantized, Scheme

PANEL = 16  # rows
CHUNK = 32  # columns are filled up to a multiple of it
KINDS = (torch.bfloat16, torch.float16, torch.float32)  # what scales are held in: the first that is exact for all


class Packed(NamedTuple):
    """A weight, in the layout of the kernels of its device: `pack` here, in `triton.py` and in `cuda.py`."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None  # None for the midpoint everywhere


def shapes(m: int, n: int, scheme: Scheme) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the codes, the scales and the zeros, in panels."""
    count = -(-m // PANEL)
    grid = count, scheme.groups(n), PANEL
    return (count, -(-n // CHUNK) * CHUNK * scheme.bits // 32, PANEL, 4), grid, grid


def pack(q: Quantized, scheme: Scheme) -> Packed:
    """A quantized weight [m, n] of 4 or 8 bits as P = ceil(m / 16) panels; what fills up rows and columns is zero.

    codes: uint8 [P, steps, 16, 4], a step of 8 columns (low nibbles 0..3, high ones 4..7), or of 4 with 8 bits.
    scales: one of KINDS [P, G, 16].
    zeros: uint8 [P, G, 16].
    """
    m, n = q.codes.shape
    codes = F.pad(q.codes, (0, -n % CHUNK, 0, -m % PANEL)).view(-(-m // PANEL), PANEL, -1, 32 // scheme.bits)
    steps = codes.transpose(1, 2)  # [P, steps, 16, 8 or 4]
    steps = steps if scheme.bits == 8 else steps[..., :4] | steps[..., 4:] << 4
    zeros = None if scheme.symmetric else _by_panel(q.zeros)
    return Packed(steps.contiguous(), _by_panel(q.scales.to(exact_dtype(q.scales))), zeros)


def unpack(panels: Packed, m: int, n: int, scheme: Scheme) -> Quantized:
    """The inverse of `pack`."""
    steps = panels.codes if scheme.bits == 8 else torch.cat((panels.codes & 15, panels.codes >> 4), -1)
    codes = steps.transpose(1, 2).reshape(len(steps) * PANEL, -1)[:m, :n]
    scales = _by_row(panels.scales, m).float()
    zeros = torch.full_like(scales, scheme.midpoint) if panels.zeros is None else _by_row(panels.zeros, m)
    return Quantized(codes.contiguous(), scales, zeros.to(torch.uint8))


def exact_dtype(scales: Tensor) -> torch.dtype:
    """The first of KINDS that holds all of them exactly."""
    return next(dtype for dtype in KINDS if torch.equal(scales.to(dtype).float(), scales))


def _by_panel(grid: Tensor) -> Tensor:
    """[m, G] to [P, G, 16]."""
    m, G = grid.shape
    return F.pad(grid, (0, 0, 0, -m % PANEL)).view(-1, PANEL, G).transpose(1, 2).contiguous()


def _by_row(grid: Tensor, m: int) -> Tensor:
    """[P, G, 16] to [m, G]."""
    return grid.transpose(1, 2).reshape(-1, grid.shape[1])[:m].contiguous()
