"""The inner loops of the solvers: columns of a block, one after the other.

The weight stands transposed here: a column of it is one contiguous row of `work` [b, m], its grids are scales and
zeros fp32 [ceil(b / width), m], and its codes are uint8 [b, m]. On the CPU the loops run natively where the library is
there (`llmquant.solve.native`), on GPUs rounding is one kernel (`llmquant.solve.cuda`, or `llmquant.solve.triton`);
what follows is their definition, and what runs elsewhere.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llmquant.native import Library, find_gpu_backend, find_library
from llmquant.scheme import Scheme
from llmquant.solve import grid, native

BLOCK = 128  # columns between two updates of the rest of the matrix


def round_columns(
    work: Tensor, U: Tensor, scales: Tensor, zeros: Tensor, codes: Tensor, width: int, scheme: Scheme, *, search: bool
) -> None:
    """Round each column and push its error on to the later ones of the block (GPTQ's inner loop).

        q_j = Q(w_j);  e_j = (w_j - q_j) / U_jj;  w_l -= e_j U_jl for l > j

    `work` holds the columns, and then their errors e. With `search`, a group takes, when its first column is reached,
    the grid with the least sum of e_j^2 over itself, errors pushed on inside of it; otherwise grids are given.

    Args:
        U: [b, >= b], upper triangular; a view into a larger factor.
    """
    pivots = U.diagonal()[: len(work)].reciprocal()
    tried = grid.candidates(scheme) if search else None
    if library := _library(work):
        native.round_columns(library, work, U, pivots, scales, zeros, codes, width, scheme, tried)
        return
    if loop := _gpu_loop(work, width, searched=search):
        loop(work, U, pivots, scales, zeros, codes, width, scheme, tried)
        return
    for j in range(len(work)):
        g, last = j // width, min(j + width, len(work))
        if tried is not None and j % width == 0:
            scales[g], zeros[g] = _search_while_rounding(work[j:last], U[j:last, j:last], tried, scheme)
        code = grid.round_to(work[j], scales[g], zeros[g], scheme)
        codes[j] = code
        work[j].sub_(grid.value_of(code, scales[g], zeros[g])).mul_(pivots[j])
        work[j + 1 :].addr_(U[j, j + 1 : len(work)], work[j], alpha=-1)


def _search_while_rounding(work: Tensor, U: Tensor, tried: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The grid of one group [g, m] under which rounding it column by column loses least: scales, zeros [m]."""
    low, high = work.amin(0).clamp_(max=0.0), work.amax(0).clamp_(min=0.0)
    grids = [grid.grid_over(low, high, candidate, scheme) for candidate in tried]
    scales, zeros = (torch.stack(part) for part in zip(*grids, strict=True))  # [C, m]
    rest = work.expand(len(tried), *work.shape).clone()
    loss = torch.zeros_like(scales)
    for j in range(len(work)):
        x = rest[:, j]
        error = (x - grid.value_of(grid.round_to(x, scales, zeros, scheme), scales, zeros)) / U[j, j]
        loss += error.square()
        rest[:, j + 1 :] -= error.unsqueeze(1) * U[j, j + 1 :].view(1, -1, 1)
    best = loss.argmin(0, keepdim=True)
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def descend_columns(
    work: Tensor, H: Tensor, scales: Tensor, zeros: Tensor, codes: Tensor, width: int, scheme: Scheme
) -> None:
    """Move each column to its best codes, all others fixed (coordinate descent on tr(E H E^T), E = W - Q).

        q'_j = Q(q_j + r_j / H_jj);  r_l -= (q'_j - q_j) H_jl for l > j

    `work` holds the gradients r = (E H)_j, and then the steps q' - q; `codes` are those before, and then those after.

    Args:
        H: [b, >= b]; a view into the whole.
    """
    diagonal = H.diagonal()[: len(work)]
    pivots = torch.where(diagonal > 0, diagonal.reciprocal(), 0.0)
    if library := _library(work):
        native.round_columns(library, work, H, pivots, scales, zeros, codes, width, scheme, descend=True)
        return
    for j in range(len(work)):
        g = j // width
        before = grid.value_of(codes[j].float(), scales[g], zeros[g])
        code = grid.round_to(before + work[j] * pivots[j], scales[g], zeros[g], scheme)
        codes[j] = code
        torch.sub(grid.value_of(code, scales[g], zeros[g]), before, out=work[j])
        work[j + 1 :].addr_(H[j, j + 1 : len(work)], work[j], alpha=-1)


def search_columns(columns: Tensor, weight: Tensor, width: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """`grid.search_grid` of a transposed weight: columns fp32 [n, m]; scales and zeros fp32 [G, m]."""
    grid.check_range(columns, scheme)
    if library := _library(columns):
        scales = columns.new_empty(len(columns) // width, columns.shape[1])
        zeros = torch.empty_like(scales)
        tried = grid.candidates(scheme)
        native.search_grids(library, columns, weight.sqrt(), scales, zeros, width, scheme, tried)
        return scales, zeros
    found, zero_points = grid.search_grid(columns.T, weight, scheme)
    return found.T.contiguous(), zero_points.T.float().contiguous()


def _gpu_loop(work: Tensor, width: int, *, searched: bool) -> Callable[..., None] | None:
    """The loop that takes the place of `round_columns` on a GPU, if there is one."""
    if work.device.type != "cuda":
        return None
    backend = find_gpu_backend()
    if backend.library and not (searched and width % 32):
        from llmquant.solve import cuda

        return partial(cuda.round_columns, backend.library)
    if backend.name == "triton":
        from llmquant.solve import triton

        return triton.round_columns
    return None


def _library(work: Tensor) -> Library | None:
    library = find_library()
    return library if isinstance(library, Library) and work.device.type == "cpu" else None
