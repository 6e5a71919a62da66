"""The loops of csrc/cpu/columns.cpp, through their plain C interface."""

import ctypes

import torch
from torch import Tensor

from llmquant.native import Library
from llmquant.scheme import Scheme


class _Task(ctypes.Structure):
    """`LlmquantColumns` of csrc/cpu/solve.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("work", "matrix", "pivots", "scales", "zeros", "codes", "candidates")),
        *((name, ctypes.c_int64) for name in ("candidate_count", "rows", "columns", "stride", "group", "bits")),
        *((name, ctypes.c_int64) for name in ("symmetric", "descend", "threads", "level")),
    ]


def round_columns(
    library: Library,
    work: Tensor,
    matrix: Tensor,
    pivots: Tensor,
    scales: Tensor,
    zeros: Tensor,
    codes: Tensor,
    width: int,
    scheme: Scheme,
    candidates: Tensor | None = None,
    *,
    descend: bool = False,
    level: int = 0,
) -> None:
    """One block of `solve.columns.round_columns`, or of `descend_columns`."""
    pivots = pivots.contiguous()
    task = _task(work, pivots, scales, zeros, width, scheme, candidates, level)
    expect_matrix(matrix, codes, work)
    task.matrix, task.stride = matrix.data_ptr(), matrix.stride(0)
    task.codes, task.descend = codes.data_ptr(), int(descend)
    library.functions.llmquant_round_columns(ctypes.byref(task))


def search_grids(
    library: Library,
    columns: Tensor,
    weights: Tensor,
    scales: Tensor,
    zeros: Tensor,
    width: int,
    scheme: Scheme,
    candidates: Tensor,
    *,
    level: int = 0,
) -> None:
    """All of `solve.columns.search_columns`; `weights` are the square roots of its weights."""
    task = _task(columns, weights, scales, zeros, width, scheme, candidates, level)
    library.functions.llmquant_search_grids(ctypes.byref(task))


def _task(
    work: Tensor,
    pivots: Tensor,
    scales: Tensor,
    zeros: Tensor,
    width: int,
    scheme: Scheme,
    candidates: Tensor | None,
    level: int,
) -> _Task:
    expect_grids(work, pivots, scales, zeros, width)
    columns, rows = work.shape
    return _Task(
        work=work.data_ptr(),
        pivots=pivots.data_ptr(),
        scales=scales.data_ptr(),
        zeros=zeros.data_ptr(),
        candidates=None if candidates is None else candidates.data_ptr(),
        candidate_count=0 if candidates is None else len(candidates),
        rows=rows,
        columns=columns,
        group=width,
        bits=scheme.bits,
        symmetric=int(scheme.symmetric),
        threads=torch.get_num_threads(),
        level=level,
    )


def expect_grids(work: Tensor, pivots: Tensor, scales: Tensor, zeros: Tensor, width: int) -> None:
    """Native code trusts the sizes that it is given: this is where they are checked, and in `expect_matrix`."""
    columns, rows = work.shape
    grids = (-(-columns // width), rows)
    for name, tensor, shape in (
        ("work", work, (columns, rows)),
        ("pivots", pivots, (columns,)),
        ("scales", scales, grids),
        ("zeros", zeros, grids),
    ):
        right = tensor.dtype == torch.float32 and tensor.shape == shape and tensor.is_contiguous()
        _expect(right and tensor.device == work.device, name)


def expect_matrix(matrix: Tensor, codes: Tensor, work: Tensor) -> None:
    _expect(matrix.dtype == torch.float32 and matrix.device == work.device, "matrix")
    _expect(matrix.stride(1) == 1 and min(matrix.shape) >= len(work), "matrix")
    right = codes.dtype == torch.uint8 and codes.shape == work.shape and codes.is_contiguous()
    _expect(right and codes.device == work.device, "codes")


def _expect(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"{name}: not the dtype, shape or layout that the native loop needs")
