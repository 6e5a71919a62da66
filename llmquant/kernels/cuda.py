"""Products with packed weights by the CUDA library of csrc/cuda, through its plain C interface; see docs/cuda.md.

The library is called with raw pointers and the current stream. It allocates nothing and waits for nothing, and torch
sees one operator, so a product can be captured in a CUDA graph and compiled around. Where csrc/torch/cuda_ops.cpp was
built, ordinary products outside of graphs go from torch to the library without coming here.
"""

import ctypes
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from llmquant.errors import RecipeError
from llmquant.kernels import slabs
from llmquant.kernels.layout import KINDS, Packed, exact_dtype
from llmquant.native import VARIABLE, CudaLibrary, find_gpu_backend
from llmquant.scheme import Quantized, Scheme

TILE = 64  # rows; slabs begin at a multiple
ALIGNED = 8  # numbers: the stride of x in 16 bytes
HALVES = KINDS[:2]  # what the kernels multiply, and scales are held in
TOO_LARGE = 2.0**16  # of a scale: csrc/cuda/finish.h multiplies them by 2^112 in bf16
AUTO, GEMV, CLUSTER, GEMM, WGMMA, PAIRS, BOXES, SPLIT, DEQUANTIZE = range(9)  # paths
ARENA = 1 << 20  # tickets for products in CUDA graphs


class _Weight(ctypes.Structure):
    """`LlmquantCudaWeight`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "group", "scale_kind")),
    ]


class _Linear(ctypes.Structure):
    """`LlmquantCudaLinear`."""

    _fields_ = [
        ("weight", _Weight),
        *((name, ctypes.c_void_p) for name in ("x", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "x_stride", "kind", "bias_kind", "path", "overlap")),
        *((name, ctypes.c_void_p) for name in ("partials", "tickets")),
        *((name, ctypes.c_int64) for name in ("partials_bytes", "tickets_count")),
    ]


@cache
def shapes(m: int, n: int, scheme: Scheme) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the codes, the scales and the zeros."""
    sizes = (ctypes.c_int64 * 3)()
    weight = _Weight(rows=m, columns=n, group=scheme.width(n), scale_kind=0)
    _library().call("sizes", ctypes.byref(weight), sizes)
    return (sizes[0],), (sizes[1] // 2,), (sizes[2],)


def pack(q: Quantized, scheme: Scheme) -> Packed:
    """A quantized weight [m, n] of 4 bits, on a GPU, in the order of the tensor cores: csrc/cuda/layout.h has it.

    Each part is flat, and as long as the library says; the scales are bf16 where that is exact, or else fp16.

    Raises:
        RecipeError: neither holds the scales exactly, or one of them is TOO_LARGE.
    """
    m, n = q.codes.shape
    dtype = exact_dtype(q.scales)
    if dtype not in HALVES or float(q.scales.amax()) >= TOO_LARGE:
        raise RecipeError(
            f"{VARIABLE}: cuda needs scales below {TOO_LARGE:.0f} that are exact in bf16 or in fp16; use triton"
        )
    codes, scales, zeros = (part.new_empty(size) for part, size in zip(q, shapes(m, n, scheme), strict=True))
    packed = Packed(codes, scales.to(dtype), None if scheme.symmetric else zeros)
    parts = [part.contiguous() for part in q]
    with torch.cuda.device_of(codes):
        _arena(codes.device, 0)  # now, so that it is there before a graph is captured
        weight = _weight(packed, m, n, scheme)
        _library().call("pack", ctypes.byref(weight), *map(_pointer, parts), _library().stream(codes))
        codes[:1].clone()  # a product may begin before what is just before it has ended: that must not be the packing
    return packed


def unpack(packed: Packed, m: int, n: int, scheme: Scheme) -> Quantized:
    """The inverse of `pack`."""
    grid = (m, scheme.groups(n))
    codes, zeros = packed.codes.new_empty(m, n), packed.codes.new_full(grid, scheme.midpoint)
    q = Quantized(codes, packed.scales.new_empty(grid, dtype=torch.float32), zeros)
    with torch.cuda.device_of(codes):
        weight = _weight(packed, m, n, scheme)
        _library().call("unpack", ctypes.byref(weight), *map(_pointer, q), _library().stream(codes))
    return q


def linear(x: Tensor, packed: Packed, bias: Tensor | None, m: int, scheme: Scheme, path: int = AUTO) -> Tensor:
    """As `reference.linear`: x [..., n], contiguous, of one of layout.KINDS, to [..., m] of the same.

    `path` is one of llmquant_cuda.h; AUTO leaves it to the library's table.
    """
    n = x.shape[-1]
    rows = x.reshape(-1, n)
    y = x.new_empty(len(rows), m)
    if len(rows):
        with torch.cuda.device_of(x):
            scales = _scales(packed.scales, x.dtype)
            served = x.dtype in HALVES and scales is not None
            needs = _needs(x.device.index, len(rows), m, n, scheme, KINDS.index(x.dtype), path) if served else None
            if needs is None or scales is None:
                slabs.multiply(
                    rows, lambda first, count: dequantize(packed, first, count, m, n, scheme, x.dtype), bias, y
                )
            else:
                _multiply(rows, packed._replace(scales=scales), bias, y, scheme, needs, path)
    return y.view(*x.shape[:-1], m)


def dequantize(packed: Packed, first: int, count: int, m: int, n: int, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Rows `first` to `first + count` of the real weight [m, n]; `first` is a multiple of TILE."""
    out = torch.empty(count, n, dtype=dtype, device=packed.codes.device)
    with torch.cuda.device_of(out):
        library, weight = _library(), _weight(packed, m, n, scheme)
        numbers = [ctypes.c_int64(number) for number in (first, count, KINDS.index(dtype))]
        library.call("dequantize", ctypes.byref(weight), *numbers, _pointer(out), library.stream(out))
    return out


def _multiply(
    x: Tensor, packed: Packed, bias: Tensor | None, y: Tensor, scheme: Scheme, needs: tuple[int, int], path: int
) -> None:
    (tokens, m), n = y.shape, x.shape[1]
    scratch, tickets = needs
    if n % ALIGNED:
        x = F.pad(x, (0, -n % ALIGNED))
    elif x.data_ptr() % 16:
        x = x.clone()
    partials, counts = x.new_empty(scratch, dtype=torch.uint8), _tickets(x.device, tickets)
    task = _Linear(
        weight=_weight(packed, m, n, scheme),
        x=x.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        tokens=tokens,
        x_stride=x.stride(0),
        kind=KINDS.index(x.dtype),
        bias_kind=0 if bias is None else KINDS.index(bias.dtype),
        partials=partials.data_ptr(),
        tickets=counts.data_ptr(),
        partials_bytes=scratch,
        tickets_count=len(counts),
        path=path,
        overlap=1,
    )
    _library().call("linear", ctypes.byref(task), _library().stream(x))


@lru_cache(4096)
def _needs(device: int, tokens: int, m: int, n: int, scheme: Scheme, kind: int, path: int) -> tuple[int, int] | None:
    """Bytes of scratch and tickets of a product on `device`, the current one; None if it is for slabs."""
    weight = _Weight(rows=m, columns=n, group=scheme.width(n), scale_kind=kind)
    task = _Linear(weight=weight, tokens=tokens, x_stride=n + -n % ALIGNED, kind=kind, path=path)
    if _library().call("path", ctypes.byref(task)) == DEQUANTIZE:
        return None
    sizes = (ctypes.c_int64 * 2)()
    _library().call("workspace", ctypes.byref(task), sizes)
    return sizes[0], sizes[1]


_cast = WeakTensorKeyDictionary()  # scales in the other one of HALVES, or None where it cannot hold them


def _scales(scales: Tensor, dtype: torch.dtype) -> Tensor | None:
    """In the dtype of the activations; None if that would round them."""
    if scales.dtype == dtype or dtype not in HALVES:
        return scales
    if scales not in _cast:
        other = scales.to(dtype)
        _cast[scales] = other if torch.equal(other.float(), scales.float()) else None
    found: Tensor | None = _cast[scales]
    return found


_arenas: dict[torch.device, Tensor] = {}
_by_stream: dict[tuple[torch.device, int], Tensor] = {}


def _tickets(device: torch.device, number: int) -> Tensor:
    """Zeros, to which the product that gets them sets them again.

    Products of one stream share theirs. A product in a CUDA graph has its own: graphs may run beside each other.
    """
    if torch.cuda.is_current_stream_capturing():
        arena = _arena(device, number)
        _arenas[device] = arena[number:]
        return arena[:number]
    place = device, torch.cuda.current_stream(device).cuda_stream
    if place not in _by_stream or len(_by_stream[place]) < number:
        _by_stream[place] = torch.zeros(max(4096, number), dtype=torch.int32, device=device)
    return _by_stream[place]


def _arena(device: torch.device, number: int) -> Tensor:
    """Tickets that no graph has, `number` or more."""
    if device not in _arenas or len(_arenas[device]) < number:
        _arenas[device] = torch.zeros(max(ARENA, number), dtype=torch.int32, device=device)
    return _arenas[device]


def _weight(packed: Packed, m: int, n: int, scheme: Scheme) -> _Weight:
    """It does not keep the tensors alive."""
    return _Weight(
        codes=packed.codes.data_ptr(),
        scales=packed.scales.data_ptr(),
        zeros=None if packed.zeros is None else packed.zeros.data_ptr(),
        rows=m,
        columns=n,
        group=scheme.width(n),
        scale_kind=KINDS.index(packed.scales.dtype),
    )


def _library() -> CudaLibrary:
    library = find_gpu_backend().library
    if library is None:
        raise RuntimeError("the CUDA library is not in use")
    return library


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
