"""The next tokens of some sequences through all packed layers of a model, natively; see csrc/cpu/decode.h."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.kernels.cpu import Task, weight_fields
from llmquant.kernels.layout import KINDS, Packed
from llmquant.native import Library
from llmquant.scheme import Scheme

LINEARS = ("q", "k", "v", "out", "gate", "up", "down")
GAINS = ("attention_gain", "mlp_gain", "q_gain", "k_gain")
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
    """A decoder layer: `linears` are those of LINEARS in their order, the gains those of its norms, [hidden].

    `q_gain` and `k_gain`, [head_width], are of norms of each head before it is rotated, where there are such.
    """

    linears: tuple[Weight, ...]
    attention_gain: Tensor
    mlp_gain: Tensor
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None


class Buffers:
    """Keys and values of a sequence: for each layer [kv_heads, capacity, head_width], contiguous."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.keys, self.values = keys, values
        self.capacity = int(keys[0].shape[-2])
        pointers = ctypes.c_void_p * len(keys)
        self.pointers = tuple(pointers(*(tensor.data_ptr() for tensor in side)) for side in (keys, values))


class Place(NamedTuple):
    """Where a token goes.

    Attributes:
        before: keys and values that the buffers hold; those of the token are put behind them.
        cosines, sines: fp32 [head_width], of the token's position.
    """

    buffers: Buffers
    before: int
    cosines: Tensor
    sines: Tensor


class _Layer(ctypes.Structure):
    """`LlmquantLayer`."""

    _fields_ = [
        *((name, Task) for name in LINEARS),
        *((name, ctypes.c_void_p) for name in GAINS),
    ]


class _Sequence(ctypes.Structure):
    """`LlmquantSequence`."""

    _fields_ = [
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in ("keys", "values")),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines")),
        *((name, ctypes.c_int64) for name in ("before", "capacity")),
    ]


class _Step(ctypes.Structure):
    """`LlmquantStep`."""

    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("sequences", ctypes.POINTER(_Sequence)),
        *((name, ctypes.c_void_p) for name in ("final_gain", "states")),
        *((name, ctypes.c_int64) for name in ("layer_count", "sequence_count", "hidden", "ffn", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_width", "kind")),
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
        q, k, *_, down = blocks[0].linears
        self.head_width, self.kv_heads = head_width, k.m // head_width
        self._function = library.functions.llmquant_decode
        self._held = blocks, final_gain  # the structures below only point to their tensors
        self._layers = (_Layer * len(blocks))(*map(_layer, blocks))
        self._step = _Step(
            layers=self._layers,
            final_gain=final_gain.data_ptr(),
            layer_count=len(blocks),
            hidden=len(final_gain),
            ffn=down.n,
            heads=q.m // head_width,
            kv_heads=self.kv_heads,
            head_width=head_width,
            kind=KINDS.index(final_gain.dtype),
            eps=eps,
            scale=scale,
            level=level,
        )

    def take(self, states: Tensor, places: Sequence[Place]) -> None:
        """Replace `states` [tokens, hidden], embeddings, by the normed states after the last layer.

        Each token is of a sequence of its own, and what it becomes does not depend on the others.
        """
        for place in places:
            if not 0 <= place.before < place.buffers.capacity:
                raise ValueError(f"there is no room for key {place.before} of {place.buffers.capacity}")
        step = self._step
        step.sequences = (_Sequence * len(places))(*map(_sequence, places))
        step.sequence_count, step.states = len(places), states.data_ptr()
        step.threads = torch.get_num_threads()
        if self._function(ctypes.byref(step)):
            raise MemoryError(f"no memory for {len(places)} tokens, after {max(place.before for place in places)} keys")


def _sequence(place: Place) -> _Sequence:
    (keys, values), buffers = place.buffers.pointers, place.buffers
    return _Sequence(keys, values, place.cosines.data_ptr(), place.sines.data_ptr(), place.before, buffers.capacity)


def _layer(block: Block) -> _Layer:
    tasks = {
        name: Task(**weight_fields(weight.panels, weight.bias, weight.m, weight.n, weight.scheme, weight.planes))
        for name, weight in zip(LINEARS, block.linears, strict=True)
    }
    gains = {name: gain.data_ptr() for name in GAINS if (gain := getattr(block, name)) is not None}
    return _Layer(**tasks, **gains)
