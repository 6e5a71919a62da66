"""The loops of `columns.py` in Triton: a program owns some rows of the weight and keeps their columns in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmquant.scheme import MAX_SCALE, MIN_SCALE, Scheme
from llmquant.solve.native import expect_grids, expect_matrix

ROWS = 32  # of one program that rounds
TRIED_ROWS = 16  # of one that tries grids
TOLD = {"num_warps": 4, "enable_fp_fusion": False}  # products and sums are rounded apart, as in the definition


def round_columns(
    work: Tensor,
    U: Tensor,
    pivots: Tensor,
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    width: int,
    scheme: Scheme,
    tried: Tensor | None = None,
) -> None:
    """One block of `columns.round_columns`; `tried` are the grids to choose from, or None where they are given.

    With grids to choose, a group is searched, rounded, and its errors are pushed on to all columns after it, so that
    the next one finds them there.
    """
    pivots = pivots.contiguous()
    expect_grids(work, pivots, scales, zeros, width)
    expect_matrix(U, codes, work)
    step = len(work) if tried is None else width
    tried = None if tried is None else tried.to(work.device).contiguous()
    for first in range(0, len(work), step):
        last = min(first + step, len(work))
        own = slice(first // width, -(-last // width))
        part, factor = work[first:last], U[first:last, first:last]
        if tried is not None:
            _search(part, factor, scales[own], zeros[own], tried, scheme)
        _round(part, factor, pivots[first:last], scales[own], zeros[own], codes[first:last], width, scheme)
        work[last:].addmm_(U[first:last, last : len(work)].T, part, alpha=-1)


def _round(
    work: Tensor, U: Tensor, pivots: Tensor, scales: Tensor, zeros: Tensor, codes: Tensor, width: int, scheme: Scheme
) -> None:
    columns, rows = work.shape
    with torch.cuda.device_of(work):
        _round_tile[(-(-rows // ROWS),)](
            work,
            U,
            pivots,
            scales,
            zeros,
            codes,
            columns,
            rows,
            U.stride(0),
            width,
            MOST=scheme.max_code,
            COLUMNS=triton.next_power_of_2(columns),
            ROWS=ROWS,
            **TOLD,
        )


def _search(work: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, tried: Tensor, scheme: Scheme) -> None:
    columns, rows = work.shape
    with torch.cuda.device_of(work):
        _search_tile[(-(-rows // TRIED_ROWS),)](
            work,
            U,
            scales,
            zeros,
            tried,
            columns,
            rows,
            U.stride(0),
            len(tried),
            MOST=scheme.max_code,
            MIDPOINT=scheme.midpoint if scheme.symmetric else 0,
            SMALLEST=MIN_SCALE,
            LARGEST=MAX_SCALE,
            COLUMNS=triton.next_power_of_2(columns),
            ROWS=TRIED_ROWS,
            **TOLD,
        )


@triton.jit
def _round_tile(
    work,
    U,
    pivots,
    scales,
    zeros,
    codes,
    columns,
    rows,
    stride,
    width,
    MOST: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`work` and `codes` [columns, rows], `scales` and `zeros` [groups, rows], U of `stride` numbers to a row."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = row < rows
    place = column[:, None].to(tl.int64) * rows + row[None, :]
    there = (column < columns)[:, None] & inside[None, :]
    tile = tl.load(work + place, mask=there, other=0.0)
    for j in range(columns):
        grid = j // width * rows + row
        scale, zero = tl.load(scales + grid, mask=inside, other=1.0), tl.load(zeros + grid, mask=inside, other=0.0)
        w = tl.sum(tl.where(column[:, None] == j, tile, 0.0), 0)
        code = _nearest(w, scale, zero, MOST)
        tl.store(codes + j * rows + row, code.to(tl.uint8), mask=inside)
        error = (w - (code - zero) * scale) * tl.load(pivots + j)
        later = (column > j) & (column < columns)
        push = tl.load(U + j * stride + column, mask=later, other=0.0)
        tile = tl.where(column[:, None] == j, error[None, :], tile - push[:, None] * error[None, :])
    tl.store(work + place, tile, mask=there)


@triton.jit
def _search_tile(
    work,
    U,
    scales,
    zeros,
    tried,
    columns,
    rows,
    stride,
    count,
    MOST: tl.constexpr,
    MIDPOINT: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`scales` and `zeros` [1, rows] of the group `work` [columns, rows]; MIDPOINT is 0 where grids are asymmetric."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = row < rows
    there = (column < columns)[:, None] & inside[None, :]
    group = tl.load(work + column[:, None].to(tl.int64) * rows + row[None, :], mask=there, other=0.0)
    low, high = tl.minimum(tl.min(group, 0), 0.0), tl.maximum(tl.max(group, 0), 0.0)
    least = tl.full((ROWS,), float("inf"), tl.float32)
    best_scale, best_zero = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for candidate in range(count):
        sign = tl.load(tried + 3 * candidate + 2)
        bottom, top = low * tl.load(tried + 3 * candidate), high * tl.load(tried + 3 * candidate + 1)
        if MIDPOINT == 0:
            scale = (top - bottom) * (1.0 / MOST)
            zero = _rounded(tl.div_rn(-bottom, tl.maximum(scale, SMALLEST)))
            zero = tl.minimum(tl.maximum(zero, 0.0), MOST)
            scale = _representable(scale, SMALLEST, LARGEST)
        else:
            longer, shorter = tl.where(sign > 0, -bottom, top), tl.where(sign > 0, top, -bottom)
            scale = tl.maximum(longer * (1.0 / MIDPOINT), shorter * (1.0 / (MIDPOINT - 1)))
            scale = _representable(scale, SMALLEST, LARGEST) * sign
            zero = tl.full((ROWS,), MIDPOINT, tl.float32)
        tile, loss = group, tl.zeros((ROWS,), tl.float32)
        for j in range(columns):
            w = tl.sum(tl.where(column[:, None] == j, tile, 0.0), 0)
            error = tl.div_rn(w - (_nearest(w, scale, zero, MOST) - zero) * scale, tl.load(U + j * stride + j))
            loss += error * error
            push = tl.load(U + j * stride + column, mask=(column > j) & (column < columns), other=0.0)
            tile -= push[:, None] * error[None, :]
        better = loss < least
        least = tl.where(better, loss, least)
        best_scale, best_zero = tl.where(better, scale, best_scale), tl.where(better, zero, best_zero)
    tl.store(scales + row, best_scale, mask=inside)
    tl.store(zeros + row, best_zero, mask=inside)


@triton.jit
def _nearest(w, scale, zero, MOST: tl.constexpr):
    """`grid.round_to`."""
    return tl.minimum(tl.maximum(_rounded(tl.div_rn(w, scale)) + zero, 0.0), MOST)


@triton.jit
def _rounded(x):
    """To the nearest whole number, ties to even: 1.5 * 2^23 leaves no bits for a fraction."""
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)


@triton.jit
def _representable(scale, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """`grid.representable` of what is not negative."""
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    return tl.minimum(tl.maximum(bits.to(tl.float32, bitcast=True), SMALLEST), LARGEST)
