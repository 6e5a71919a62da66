"""The native CPU kernels of csrc/cpu, through their plain C interface."""

import ctypes

import torch
from torch import Tensor

from llmquant.native import Library
from llmquant.scheme import Scheme

# From this many tokens on it is faster to dequantize a panel of the weight and leave the product to the BLAS of torch.
PANEL_TOKENS = 32
PANEL_BYTES = 8 * 2**20  # fits the last cache level of most machines


class _Task(ctypes.Structure):
    """`LlmquantLinear` of csrc/cpu/linear.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zeros", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "columns", "group", "bits", "threads", "level")),
    ]


class Native:
    """The products of the native library."""

    def __init__(self, library: Library) -> None:
        self._functions = library.functions

    def linear(
        self, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, scheme: Scheme
    ) -> Tensor:
        """As `reference.linear`; all tensors on the CPU and contiguous, but for x."""
        flat = x.reshape(-1, x.shape[-1]).float().contiguous()
        bias = None if bias is None else bias.float().contiguous()
        multiply = self.stream if len(flat) < PANEL_TOKENS else self.panels
        y = multiply(flat, packed, scales, zeros, bias, scheme)
        return y.reshape(*x.shape[:-1], len(packed)).to(x.dtype)

    def stream(
        self,
        x: Tensor,
        packed: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        scheme: Scheme,
        level: int = 0,
    ) -> Tensor:
        """x fp32 [k, n] to fp32 [k, m], unpacking each weight in registers: the best for few tokens."""
        y = torch.empty(len(x), len(packed))
        task = self._task(x.shape[1], packed, scales, zeros, scheme, y, level)
        task.tokens = len(x)
        task.x, task.bias = x.data_ptr(), _address(bias)
        if self._functions.llmquant_linear(ctypes.byref(task)):
            raise MemoryError(f"no memory for {len(x)} x {x.shape[1]} activations")
        return y

    def panels(
        self, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, scheme: Scheme
    ) -> Tensor:
        """x fp32 [k, n] to fp32 [k, m], some dequantized rows at a time: the best for many tokens."""
        m, n = len(packed), x.shape[1]
        rows = max(1, PANEL_BYTES // (4 * n))
        y = torch.empty(len(x), m)
        panel = torch.empty(min(rows, m), n)
        for first in range(0, m, rows):
            part = slice(first, min(first + rows, m))
            own = None if zeros is None else zeros[part]
            weight = self.dequantize(packed[part], scales[part], own, scheme, panel[: part.stop - first])
            torch.mm(x, weight.T, out=y[:, part])
        return y if bias is None else y.add_(bias)

    def dequantize(
        self, packed: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme, out: Tensor, level: int = 0
    ) -> Tensor:
        """The real weight, into `out`, fp32 [m, n]."""
        task = self._task(out.shape[1], packed, scales, zeros, scheme, out, level)
        self._functions.llmquant_dequantize(ctypes.byref(task))
        return out

    def _task(
        self, n: int, packed: Tensor, scales: Tensor, zeros: Tensor | None, scheme: Scheme, y: Tensor, level: int
    ) -> _Task:
        return _Task(
            codes=packed.data_ptr(),
            scales=scales.data_ptr(),
            zeros=_address(zeros),
            y=y.data_ptr(),
            rows=len(packed),
            columns=n,
            group=scheme.width(n),
            bits=scheme.bits,
            threads=torch.get_num_threads(),
            level=level,
        )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
