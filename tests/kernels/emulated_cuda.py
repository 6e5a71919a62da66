"""csrc/cuda compiled for the CPU by a C++ compiler alone: the same sources, on the device of csrc/cuda/emulated.h."""

import ctypes
import fcntl
import math
import mmap
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from llmquant.scheme import Quantized, Scheme

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
KINDS = [torch.bfloat16, torch.float16, torch.float32]
AUTO, GEMV, CLUSTER, GEMM, WGMMA, PAIRS, BOXES, SPLIT, DEQUANTIZE = range(9)


def build_once(tmp_path_factory: pytest.TempPathFactory, name: str, arguments: Sequence[object]) -> Path:
    """A library, by the C++ compiler, for all processes of this test run."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler on the PATH")
    base = tmp_path_factory.getbasetemp()
    library = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            unfinished = library.with_suffix(".unfinished")
            subprocess.run([compiler, *map(str, arguments), "-o", str(unfinished)], check=True)
            unfinished.rename(library)
    return library


class Weight(ctypes.Structure):
    """`LlmquantCudaWeight` of csrc/cuda/llmquant_cuda.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "scale_kind")),
    ]


class Linear(ctypes.Structure):
    """`LlmquantCudaLinear`."""

    _fields_ = [
        ("weight", Weight),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "x_stride", "kind", "bias_kind", "path", "overlap")),
        *((name, ctypes.c_void_p) for name in ("partials", "tickets")),
        *((name, ctypes.c_int64) for name in ("partials_bytes", "tickets_count")),
    ]


class Columns(ctypes.Structure):
    """`LlmquantCudaColumns`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("work", "matrix", "pivots", "scales", "zeros", "codes", "candidates")),
        *((name, ctypes.c_int64) for name in ("candidate_count", "rows", "columns", "stride", "group")),
        *((name, ctypes.c_int64) for name in ("bits", "symmetric")),
    ]


class Packed(NamedTuple):
    """A weight in the layout of the kernels."""

    task: Weight
    codes: Tensor  # uint32 [tiles, steps, 32, 4], as int32
    scales: Tensor  # [tiles, groups, 64]
    zeros: Tensor | None  # uint32 [tiles, groups, 8], as int32


def random_weight(scheme: Scheme, m: int, n: int, seed: int = 0) -> Quantized:
    """Codes, zero points and scales 1 .. 255 / 2^14, which are exact in fp16 and in bf16."""
    generator = torch.Generator().manual_seed(seed)
    grid = (m, scheme.groups(n))
    codes = torch.randint(0, scheme.max_code + 1, (m, n), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, scheme.max_code + 1, grid, dtype=torch.uint8, generator=generator)
    if scheme.symmetric:
        zeros.fill_(scheme.midpoint)
    return Quantized(codes, torch.randint(1, 256, grid, generator=generator) * 2.0**-14, zeros)


def guarded(tensor: Tensor) -> Tensor:
    """A copy at the end of a page, before one that nobody may touch: reading past it ends the process."""
    size = tensor.numel() * tensor.element_size()
    room = math.ceil(max(size, 1) / mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protected = ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), mmap.PAGESIZE, 0)
    assert protected == 0
    first = (room - size) // 16 * 16
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=first).view(tensor.shape)
    return copy.copy_(tensor)


class Emulator:
    """The library, opened. Every call fails with the library's own words."""

    def __init__(self, library: Path) -> None:
        self.functions = ctypes.CDLL(str(library))
        self.functions.llmquant_cuda_message.restype = ctypes.c_char_p

    def emulate(
        self, processors: int = 2, capability: int = 90, seed: int = 0, *, late: bool = False, gpc: int | None = None
    ) -> None:
        """So many multiprocessors, `gpc` of them to a GPC: all."""
        self.functions.llmquant_emulate(*map(ctypes.c_int64, (processors, gpc or processors, capability, seed, late)))

    def call(self, name: str, *arguments: object) -> int:
        function = getattr(self.functions, f"llmquant_cuda_{name}")
        function.restype = ctypes.c_int64
        return int(function(*arguments))

    def check(self, name: str, *arguments: object) -> None:
        code = self.call(name, *arguments)
        assert code == 0, self.functions.llmquant_cuda_message(ctypes.c_int64(code)).decode()

    def sizes(self, name: str, task: ctypes.Structure, count: int) -> Sequence[int]:
        sizes = (ctypes.c_int64 * count)()
        self.check(name, ctypes.byref(task), sizes)
        return list(sizes)

    def weight(self, scheme: Scheme, m: int, n: int, dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> Weight:
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        return Weight(*pointers, m, n, scheme.width(n), KINDS.index(dtype))

    def pack(self, q: Quantized, scheme: Scheme, dtype: torch.dtype) -> Packed:
        m, n = q.codes.shape
        sizes = self.sizes("sizes", self.weight(scheme, m, n, dtype, (None,) * 3), 3)
        codes, scales, zeros = (torch.full((size,), 0x5A, dtype=torch.uint8) for size in sizes)
        parts = guarded(codes), guarded(scales), None if scheme.symmetric else guarded(zeros)
        task = self.weight(scheme, m, n, dtype, parts)
        given = [guarded(tensor) for tensor in q]
        self.check("pack", ctypes.byref(task), *(ctypes.c_void_p(tensor.data_ptr()) for tensor in given), None)
        codes, scales = parts[0].view(torch.int32), parts[1].view(dtype)
        tiles = math.ceil(m / 128) * 2
        shaped = codes.view(tiles, -1, 32, 4), scales.view(tiles, -1, 64)
        return Packed(task, *shaped, None if parts[2] is None else parts[2].view(torch.int32).view(tiles, -1, 8))

    def unpack(self, packed: Packed) -> Quantized:
        m, n = packed.task.rows, packed.task.columns
        G = math.ceil(n / packed.task.group)
        parts = Quantized(
            guarded(torch.full((m, n), 99, dtype=torch.uint8)),
            guarded(torch.full((m, G), torch.nan)),
            guarded(torch.full((m, G), 99, dtype=torch.uint8)),
        )
        self.check("unpack", ctypes.byref(packed.task), *(ctypes.c_void_p(part.data_ptr()) for part in parts), None)
        return parts

    def dequantize(self, packed: Packed, first: int, count: int, dtype: torch.dtype) -> Tensor:
        out = guarded(torch.full((count, packed.task.columns), torch.nan, dtype=dtype))
        numbers = map(ctypes.c_int64, (first, count, KINDS.index(dtype)))
        self.check("dequantize", ctypes.byref(packed.task), *numbers, ctypes.c_void_p(out.data_ptr()), None)
        return out

    def linear(self, x: Tensor, packed: Packed, bias: Tensor | None = None, path: int = AUTO, runs: int = 1) -> Tensor:
        """The product, `runs` times into workspaces that were poisoned once; every run has the same bits."""
        tokens, n = x.shape
        held = guarded(x) if n % 8 == 0 else guarded(torch.nn.functional.pad(x, (0, -n % 8), value=torch.nan))
        bias = None if bias is None else guarded(bias)
        task = Linear(packed.task, held.data_ptr(), None if bias is None else bias.data_ptr(), tokens=tokens)
        task.x_stride, task.kind, task.path, task.overlap = held.shape[1], KINDS.index(x.dtype), path, 1
        task.bias_kind = 0 if bias is None else KINDS.index(bias.dtype)
        room, count = self.sizes("workspace", task, 2)
        partials, tickets = (
            guarded(torch.full((max(room, 16),), 0xFF, dtype=torch.uint8)),
            guarded(torch.zeros(max(count, 1)).int()),
        )
        task.partials, task.tickets, task.partials_bytes, task.tickets_count = (
            partials.data_ptr(),
            tickets.data_ptr(),
            room,
            count,
        )
        results = []
        for _ in range(runs):
            y = guarded(torch.full((tokens, packed.task.rows), torch.nan, dtype=x.dtype))
            task.y = y.data_ptr()
            self.check("linear", ctypes.byref(task), None)
            results.append(y)
            assert not tickets.any(), "the tickets are not back at zero"
        assert all(torch.equal(results[0].view(torch.int16), y.view(torch.int16)) for y in results)
        return results[0]
