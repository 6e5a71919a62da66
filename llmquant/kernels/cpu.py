"""The native CPU kernels of csrc/cpu, through their plain C interface."""

import ctypes
import sys

import torch
from torch import Tensor

from llmquant.kernels.layout import KINDS, PANEL, Panels
from llmquant.native import Library
from llmquant.scheme import Scheme

# Activations become integers: of 8 bits, or of two planes of 8 that make 15, which errs less than bf16 does.
PLANES = {"int8": 1, "exact": 2}

# From so many tokens on, `exact` is faster if a slab of the weight is dequantized and the product left to torch's BLAS;
# with AVX-512 it never is.
SLAB_TOKENS = {"AVX2": 32, "baseline": 32}
SLAB_BYTES = 8 * 2**20  # fits the last cache level of most machines


class _Task(ctypes.Structure):
    """`LlmquantLinear` of csrc/cpu/linear.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zeros", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "columns", "group", "bits", "planes", "kind")),
        *((name, ctypes.c_int64) for name in ("threads", "level")),
    ]


class Native:
    """The products of the native library."""

    def __init__(self, library: Library) -> None:
        self._functions = library.functions
        self._slab_tokens = SLAB_TOKENS.get(library.levels[0], sys.maxsize)

    def linear(
        self, x: Tensor, panels: Panels, bias: Tensor | None, m: int, scheme: Scheme, precision: str = "exact"
    ) -> Tensor:
        """As `reference.linear`; all tensors on the CPU and contiguous, but for x. `precision` is one of PLANES."""
        flat = x.reshape(-1, x.shape[-1]).float().contiguous()
        bias = None if bias is None else bias.float().contiguous()
        if precision == "exact" and len(flat) >= self._slab_tokens:
            y = self.slabs(flat, panels, bias, m, scheme)
        else:
            y = self.stream(flat, panels, bias, m, scheme, PLANES[precision])
        return y.reshape(*x.shape[:-1], m).to(x.dtype)

    def stream(
        self, x: Tensor, panels: Panels, bias: Tensor | None, m: int, scheme: Scheme, planes: int, level: int = 0
    ) -> Tensor:
        """x fp32 [k, n] to fp32 [k, m] in products of integers, each weight unpacked in registers."""
        y = torch.empty(len(x), m)
        task = _task(panels, m, x.shape[1], scheme, y, level)
        task.tokens, task.planes = len(x), planes
        task.x, task.bias = x.data_ptr(), _address(bias)
        if self._functions.llmquant_linear(ctypes.byref(task)):
            raise MemoryError(f"no memory for {len(x)} x {x.shape[1]} activations")
        return y

    def slabs(self, x: Tensor, panels: Panels, bias: Tensor | None, m: int, scheme: Scheme) -> Tensor:
        """x fp32 [k, n] to fp32 [k, m], some dequantized rows at a time: the best for many tokens."""
        n = x.shape[1]
        step = max(1, SLAB_BYTES // (4 * n * PANEL))  # panels
        y = torch.empty(len(x), m)
        slab = torch.empty(n * step * PANEL)
        for first in range(0, len(panels.codes), step):
            part = slice(first, first + step)
            own = Panels(panels.codes[part], panels.scales[part], None if panels.zeros is None else panels.zeros[part])
            start, end = first * PANEL, min(m, (first + step) * PANEL)
            weight = self.dequantize(own, scheme, slab[: n * (end - start)].view(n, end - start))
            torch.mm(x, weight, out=y[:, start:end])
        return y if bias is None else y.add_(bias)

    def dequantize(self, panels: Panels, scheme: Scheme, out: Tensor, level: int = 0) -> Tensor:
        """The real weight, transposed, into `out`, fp32 [n, m]."""
        n, m = out.shape
        self._functions.llmquant_dequantize(ctypes.byref(_task(panels, m, n, scheme, out, level)))
        return out


def _task(panels: Panels, m: int, n: int, scheme: Scheme, y: Tensor, level: int) -> _Task:
    return _Task(
        codes=panels.codes.data_ptr(),
        scales=panels.scales.data_ptr(),
        zeros=_address(panels.zeros),
        y=y.data_ptr(),
        rows=m,
        columns=n,
        group=scheme.width(n),
        bits=scheme.bits,
        kind=KINDS.index(panels.scales.dtype),
        threads=torch.get_num_threads(),
        level=level,
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
