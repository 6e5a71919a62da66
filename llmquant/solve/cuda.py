"""GPTQ's inner loop by the CUDA library, through its plain C interface."""

import ctypes

import torch
from torch import Tensor

from llmquant.native import CudaLibrary
from llmquant.scheme import Scheme
from llmquant.solve.native import expect_grids, expect_matrix


class _Columns(ctypes.Structure):
    """`LlmquantCudaColumns` of csrc/cuda/llmquant_cuda.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("work", "matrix", "pivots", "scales", "zeros", "codes", "candidates")),
        *((name, ctypes.c_int64) for name in ("candidate_count", "rows", "columns", "stride", "group")),
        *((name, ctypes.c_int64) for name in ("bits", "symmetric")),
    ]


def round_columns(
    library: CudaLibrary,
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
    """One block of `solve.columns.round_columns`, all on one GPU; `tried` are the grids to choose from."""
    pivots = pivots.contiguous()
    expect_grids(work, pivots, scales, zeros, width)
    expect_matrix(U, codes, work)
    columns, rows = work.shape
    tried = None if tried is None else tried.to(work.device).contiguous()
    task = _Columns(
        work=work.data_ptr(),
        matrix=U.data_ptr(),
        pivots=pivots.data_ptr(),
        scales=scales.data_ptr(),
        zeros=zeros.data_ptr(),
        codes=codes.data_ptr(),
        candidates=None if tried is None else tried.data_ptr(),
        candidate_count=0 if tried is None else len(tried),
        rows=rows,
        columns=columns,
        stride=U.stride(0),
        group=width,
        bits=scheme.bits,
        symmetric=int(scheme.symmetric),
    )
    with torch.cuda.device_of(work):
        library.call("round_columns", ctypes.byref(task), library.stream(work))
