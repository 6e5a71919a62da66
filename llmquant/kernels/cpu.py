"""The native CPU kernels of csrc/cpu, through their plain C interface."""

import ctypes
import os
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor

from llmquant.scheme import Scheme

LIBRARY = Path(__file__).parent.parent / "_native" / "llmquant_cpu.so"
ABI = 1

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
    """The library, opened.

    Raises:
        OSError: it is not there, or was built from other sources than this file.
    """

    def __init__(self) -> None:
        if not LIBRARY.is_file():
            raise OSError("it was not built; install CMake and a C++ compiler, then llmquant again")
        self._library = ctypes.CDLL(os.fspath(LIBRARY))
        if self._library.llmquant_abi() != ABI:
            raise OSError(f"{LIBRARY} belongs to another version; install llmquant again")
        self._library.llmquant_level.restype = ctypes.c_char_p
        self._library.llmquant_level.argtypes = [ctypes.c_int64]

    def __str__(self) -> str:
        threads = "OpenMP" if self._library.llmquant_threaded() else "one thread, built without OpenMP"
        return f"{self.levels[0]}, {threads}"

    @cached_property
    def levels(self) -> list[str]:
        """The instruction sets that this machine can run, best first."""
        names = map(self._library.llmquant_level, count())
        return [name.decode() for name in takewhile(lambda name: name is not None, names)]

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
        if self._library.llmquant_linear(ctypes.byref(task)):
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
        self._library.llmquant_dequantize(ctypes.byref(task))
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
