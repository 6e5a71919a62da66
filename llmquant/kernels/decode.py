"""A single token through all packed layers of a model, by the native library; see csrc/cpu/decode.h."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.kernels.cpu import Task, weight_fields
from llmquant.kernels.layout import KINDS, Packed
from llmquant.native import Library
from llmquant.scheme import Scheme

LINEARS = ("q", "k", "v", "out", "gate", "up", "down")
HEAD_MULTIPLE = 16  # the width of a head is one of it


@dataclass(frozen=True)
class Weight:
    """A packed linear [m, n], and the planes of integers that its input becomes."""

    panels: Packed
    bias: Tensor | None
    m: int
    n: int
    scheme: Scheme
    planes: int


@dataclass(frozen=True)
class Block:
    """A decoder layer: `linears` are those of LINEARS in their order, the gains those of its norms, [hidden]."""

    linears: tuple[Weight, ...]
    attention_gain: Tensor
    mlp_gain: Tensor


class _Layer(ctypes.Structure):
    """`LlmquantLayer`."""

    _fields_ = [
        *((name, Task) for name in LINEARS),
        *((name, ctypes.c_void_p) for name in ("attention_gain", "mlp_gain", "keys", "values")),
    ]


class _Step(ctypes.Structure):
    """`LlmquantStep`."""

    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("final_gain", "cosines", "sines", "state")),
        *((name, ctypes.c_int64) for name in ("layer_count", "hidden", "ffn", "heads", "kv_heads", "head_width")),
        *((name, ctypes.c_int64) for name in ("before", "capacity", "kind")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
        *((name, ctypes.c_int64) for name in ("threads", "level")),
    ]


class Steps:
    """The layers of one model. All tensors are on the CPU and contiguous, gains and states of one of KINDS."""

    def __init__(
        self,
        library: Library,
        blocks: Sequence[Block],
        final_gain: Tensor,
        *,
        head_width: int,
        eps: float,
        scale: float,
        level: int = 0,
    ) -> None:
        self._function = library.functions.llmquant_decode
        self._held = blocks, final_gain  # the structures below only point to their tensors
        self._layers = (_Layer * len(blocks))(*map(_layer, blocks))
        q, k, *_, down = blocks[0].linears
        self._step = _Step(
            layers=self._layers,
            final_gain=final_gain.data_ptr(),
            layer_count=len(blocks),
            hidden=len(final_gain),
            ffn=down.n,
            heads=q.m // head_width,
            kv_heads=k.m // head_width,
            head_width=head_width,
            kind=KINDS.index(final_gain.dtype),
            eps=eps,
            scale=scale,
            level=level,
        )

    def hold(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Use these buffers, one of [kv_heads, capacity, head_width] for each layer; the caller keeps them alive."""
        for layer, k, v in zip(self._layers, keys, values, strict=True):
            layer.keys, layer.values = k.data_ptr(), v.data_ptr()
        self._step.capacity = keys[0].shape[-2]

    def take(self, state: Tensor, cosines: Tensor, sines: Tensor, before: int) -> None:
        """Replace `state` [hidden], the embedding of a token, by the normed state after the last layer.

        Args:
            cosines, sines: fp32 [head_width], of the token's position.
            before: keys and values that the buffers hold; those of the token are put behind them.
        """
        step = self._step
        if not 0 <= before < step.capacity:
            raise ValueError(f"there is no room for key {before} of {step.capacity}")
        step.state, step.cosines, step.sines = state.data_ptr(), cosines.data_ptr(), sines.data_ptr()
        step.before, step.threads = before, torch.get_num_threads()
        if self._function(ctypes.byref(step)):
            raise MemoryError(f"no memory for attention to {before} keys")


def _layer(block: Block) -> _Layer:
    tasks = {
        name: Task(**weight_fields(weight.panels, weight.bias, weight.m, weight.n, weight.scheme, weight.planes))
        for name, weight in zip(LINEARS, block.linears, strict=True)
    }
    return _Layer(**tasks, attention_gain=block.attention_gain.data_ptr(), mlp_gain=block.mlp_gain.data_ptr())
