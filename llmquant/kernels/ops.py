"""`torch.ops.llmquant`: `w4_linear`, the product with a packed weight; `dense`, that with a plain one, for few tokens;
and `attention`, which is causal.

On the CPU the native library serves, where it was built: bound to torch by csrc/torch, or called from here where that
part was not built. On GPUs `w4_linear` is computed by `kernels.backends`; where csrc/torch binds the CUDA library, too,
only what that binding hands over comes here, as `w4_linear_any`. Everything else is the reference.
"""

import threading
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmquant.errors import RecipeError
from llmquant.kernels import reference
from llmquant.kernels.backends import kernels_for
from llmquant.kernels.cpu import PLANES, Native
from llmquant.kernels.layout import KINDS, Packed
from llmquant.native import BINDING, Library, find_library
from llmquant.scheme import Scheme

_definitions = torch.library.Library("llmquant", "DEF")
_SCHEMA = (
    "(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int rows, int bits, int group_size,"
    " int planes) -> Tensor"
)
_definitions.define(f"w4_linear{_SCHEMA}")
_definitions.define(f"w4_linear_any{_SCHEMA}")
_definitions.define("dense(Tensor x, Tensor weight) -> Tensor")
_definitions.define("attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")


@torch.library.impl(_definitions, "w4_linear", "CompositeExplicitAutograd")
def _w4_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    rows: int,
    bits: int,
    group_size: int,
    planes: int,
) -> Tensor:
    scheme, packed = Scheme(bits, group_size, zeros is None), Packed(codes, scales, zeros)
    _check(x, packed, bias, rows, scheme, planes)
    library = find_library()
    if isinstance(library, Library) and x.device.type == "cpu":
        return Native(library).linear(x.contiguous(), packed, bias, rows, scheme, planes)
    return kernels_for(x.device.type, bits).linear(x.contiguous(), packed, bias, rows, scheme)


_raised = threading.local()


@torch.library.impl(_definitions, "w4_linear_any", "CompositeExplicitAutograd")
def _w4_linear_any(*operands: Any) -> Tensor:
    """What csrc/torch/cuda_ops.cpp hands over. No exception passes through torch's stable ABI: instead its words do."""
    try:
        return _w4_linear(*operands)
    except BaseException as error:  # a signal's, too
        _raised.last = error.with_traceback(None)  # which would keep the operands
        return torch.frombuffer(bytearray(_words(error), "utf-8"), dtype=torch.uint8)


def as_raised(error: RuntimeError) -> BaseException:
    """What was raised in Python, if that is what came back as `error`, by its words alone."""
    last, _raised.last = getattr(_raised, "last", None), None
    return last if last and _words(last) == str(error) else error


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


@torch.library.register_fake("llmquant::w4_linear")
def _w4_linear_fake(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    rows: int,
    bits: int,
    group_size: int,
    planes: int,
) -> Tensor:
    _check(x, Packed(codes, scales, zeros), bias, rows, Scheme(bits, group_size, zeros is None), planes)
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.impl(_definitions, "dense", "CompositeExplicitAutograd")
def _dense(x: Tensor, weight: Tensor) -> Tensor:
    _check_dense(x, weight)
    library = find_library()
    if isinstance(library, Library) and x.device.type == "cpu":
        return Native(library).dense(x.contiguous(), weight.contiguous())
    return F.linear(x, weight)


@torch.library.register_fake("llmquant::dense")
def _dense_fake(x: Tensor, weight: Tensor) -> Tensor:
    _check_dense(x, weight)
    return x.new_empty((*x.shape[:-1], len(weight)))


def _check_dense(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1] or 0 in (*weight.shape, *x.shape):
        raise RuntimeError(f"dense: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit together")
    if x.dtype not in KINDS or x.dtype != weight.dtype:
        raise RuntimeError(f"dense: x is {x.dtype}, weight {weight.dtype}; both have to be bf16, fp16 or fp32")


@torch.library.impl(_definitions, "attention", "CompositeExplicitAutograd")
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    _check_attention(q, k, v, scale)
    library = find_library()
    if isinstance(library, Library) and q.device.type == "cpu":
        q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
        return Native(library).attention(q, k, v, scale)
    return reference.attention(q, k, v, scale)


@torch.library.register_fake("llmquant::attention")
def _attention_fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    _check_attention(q, k, v, scale)
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _check(x: Tensor, packed: Packed, bias: Tensor | None, m: int, scheme: Scheme, planes: int) -> None:
    """Native code trusts the sizes that it is given: this is where they are checked."""
    n = int(x.shape[-1])  # a symbol where torch.compile traces; the layout of the weight depends on its value
    sizes = kernels_for(x.device.type, scheme.bits).shapes(m, n, scheme)
    codes, scales, zeros = packed
    _expect("x", x.contiguous(), x.shape, KINDS, x.device)
    _expect("codes", codes, sizes[0], (torch.uint8,), x.device)
    _expect("scales", scales, sizes[1], KINDS, x.device)
    if zeros is not None:
        _expect("zeros", zeros, sizes[2], (torch.uint8,), x.device)
    if bias is not None:
        _expect("bias", bias, (m,), KINDS, x.device)
    if planes not in PLANES.values():
        raise RuntimeError(f"w4_linear: planes is {planes}; use 1 or 2")


def _check_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    alike = q.dtype in KINDS and q.dtype == k.dtype == v.dtype and q.dim() == k.dim() == v.dim() == 4
    if not alike or 0 in (*q.shape, *v.shape):
        raise RuntimeError(f"attention: q, k, v are {[(t.dtype, tuple(t.shape)) for t in (q, k, v)]}; see reference.py")
    (batch, heads, queries, width), (_, kv_heads, keys, v_width) = q.shape, v.shape
    fits = k.shape == (batch, kv_heads, keys, width) and v.shape == (batch, kv_heads, keys, v_width)
    if not fits or heads % kv_heads or queries > keys:
        raise RuntimeError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together")
    if not scale > 0:
        raise RuntimeError(f"attention: scale is {scale}; it has to be positive")


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    right = tuple(tensor.shape) == tuple(shape) and tensor.dtype in dtypes and tensor.is_contiguous()
    if not right or tensor.device != device:
        found = f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        wanted = f"{' or '.join(map(str, dtypes))} {tuple(shape)}"
        raise RuntimeError(f"w4_linear: {name} is {found}; expected contiguous {wanted} on {device}")


def _bind() -> None:
    with suppress(RecipeError, OSError):  # said where a product is asked for, or not needed
        if isinstance(find_library(), Library) and BINDING.is_file():
            torch.ops.load_library(BINDING)


_bind()
