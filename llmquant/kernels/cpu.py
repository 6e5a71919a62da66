"""The native CPU kernels of csrc/cpu, through their plain C interface."""

import ctypes

import torch
from torch import Tensor

from llmquant.kernels.layout import KINDS, Packed
from llmquant.native import Library
from llmquant.scheme import Scheme

# Activations become integers: of 8 bits, or of two planes of 8 that make 15, which errs less than bf16 does.
PLANES = {"int8": 1, "exact": 2}


class Task(ctypes.Structure):
    """`LlmquantLinear` of csrc/cpu/linear.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scales", "zeros", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "columns", "group", "bits", "planes")),
        *((name, ctypes.c_int64) for name in ("x_kind", "scale_kind", "bias_kind", "threads", "level")),
    ]


def weight_fields(
    panels: Packed, bias: Tensor | None, m: int, n: int, scheme: Scheme, planes: int
) -> dict[str, int | None]:
    """What a `Task` says of a weight [m, n]; it does not keep the tensors alive."""
    return {
        "codes": panels.codes.data_ptr(),
        "scales": panels.scales.data_ptr(),
        "zeros": None if panels.zeros is None else panels.zeros.data_ptr(),
        "bias": None if bias is None else bias.data_ptr(),
        "rows": m,
        "columns": n,
        "group": scheme.width(n),
        "bits": scheme.bits,
        "planes": planes,
        "scale_kind": KINDS.index(panels.scales.dtype),
        "bias_kind": 0 if bias is None else KINDS.index(bias.dtype),
    }


class _Dense(ctypes.Structure):
    """`LlmquantDense` of csrc/cpu/decode.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "y")),
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "columns", "kind", "threads", "level")),
    ]


class _Attention(ctypes.Structure):
    """`LlmquantAttention` of csrc/cpu/attention.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "qk_width", "v_width")),
        *((name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "v_strides")),
        ("kind", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int64),
        ("level", ctypes.c_int64),
    ]


class Native:
    """What the native library computes at inference."""

    def __init__(self, library: Library) -> None:
        self._functions = library.functions

    def linear(
        self, x: Tensor, panels: Packed, bias: Tensor | None, m: int, scheme: Scheme, planes: int = 2, level: int = 0
    ) -> Tensor:
        """As `reference.linear`, in products of integers; each weight is unpacked in registers.

        Args:
            x, bias: on the CPU, contiguous, and each of one of KINDS.
            planes: one of the values of PLANES.
            level: an index of `Library.levels`.
        """
        n = x.shape[-1]
        y = x.new_empty(*x.shape[:-1], m)
        task = Task(
            **weight_fields(panels, bias, m, n, scheme, planes),
            x=x.data_ptr(),
            y=y.data_ptr(),
            tokens=x.numel() // n,
            x_kind=KINDS.index(x.dtype),
            threads=torch.get_num_threads(),
            level=level,
        )
        if self._functions.llmquant_linear(ctypes.byref(task)):
            raise MemoryError(f"no memory for {tuple(x.shape)} activations")
        return y

    def dense(self, x: Tensor, weight: Tensor, level: int = 0) -> Tensor:
        """x [..., n] times W^T, W [m, n]: [..., m]. On the CPU, contiguous, both of one of KINDS; for few tokens."""
        m, n = weight.shape
        y = x.new_empty(*x.shape[:-1], m)
        task = _Dense(
            x=x.data_ptr(),
            w=weight.data_ptr(),
            y=y.data_ptr(),
            tokens=x.numel() // n,
            rows=m,
            columns=n,
            kind=KINDS.index(x.dtype),
            threads=torch.get_num_threads(),
            level=level,
        )
        if self._functions.llmquant_dense(ctypes.byref(task)):
            raise MemoryError(f"no memory for {tuple(x.shape)} activations")
        return y

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float, level: int = 0) -> Tensor:
        """As `reference.attention`. On the CPU, all of one of KINDS, and the last dimension contiguous."""
        batch, heads, queries, qk_width = q.shape
        _, kv_heads, keys, v_width = v.shape
        out = q.new_empty(batch, queries, heads, v_width)
        task = _Attention(
            **{name: tensor.data_ptr() for name, tensor in zip(("q", "k", "v", "out"), (q, k, v, out), strict=True)},
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            queries=queries,
            keys=keys,
            qk_width=qk_width,
            v_width=v_width,
            q_strides=q.stride()[:3],
            k_strides=k.stride()[:3],
            v_strides=v.stride()[:3],
            kind=KINDS.index(q.dtype),
            scale=scale,
            threads=torch.get_num_threads(),
            level=level,
        )
        if self._functions.llmquant_attention(ctypes.byref(task)):
            raise MemoryError(f"no memory for attention of {tuple(q.shape)} queries")
        return out
