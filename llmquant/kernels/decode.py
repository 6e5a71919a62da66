"""The next tokens of some sequences through all packed layers of a model, natively; see csrc/cpu/decode.h."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.kernels.cpu import Task, weight_fields
from llmquant.kernels.layout import KINDS, Packed
from llmquant.native import Library
from llmquant.scheme import Scheme

ATTENTION, FEED_FORWARD = ("q", "k", "v", "out"), ("gate", "up", "down")
LINEARS = (*ATTENTION, *FEED_FORWARD)
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
class Mixture:
    """Experts, all of one shape, each with the linears of FEED_FORWARD in their order.

    Attributes:
        router: [experts, hidden], of the gains' dtype; a token goes to the `chosen` experts that it scores highest.
        normalized: their weights are the softmax of their scores alone, and not of all.
    """

    router: Tensor
    experts: tuple[tuple[Weight, ...], ...]
    chosen: int
    normalized: bool


@dataclass(frozen=True)
class Block:
    """A decoder layer: `linears` are those of LINEARS in their order, the gains those of its norms, [hidden].

    `q_gain` and `k_gain`, [head_width], are of norms of each head before it is rotated, where there are such. A layer
    with a mixture has the linears of ATTENTION alone.
    """

    linears: tuple[Weight, ...]
    attention_gain: Tensor
    mlp_gain: Tensor
    q_gain: Tensor | None = None
    k_gain: Tensor | None = None
    mixture: Mixture | None = field(default=None, kw_only=True)


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


class _Mixture(ctypes.Structure):
    """`LlmquantMixture`."""

    _fields_ = [
        ("router", ctypes.c_void_p),
        ("experts", ctypes.POINTER(Task)),
        *((name, ctypes.c_int64) for name in ("count", "chosen", "normalized")),
    ]


class _Layer(ctypes.Structure):
    """`LlmquantLayer`."""

    _fields_ = [
        *((name, Task) for name in LINEARS),
        ("mixture", _Mixture),
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
        q, k, *_ = blocks[0].linears
        dense = [block.linears[-1].n for block in blocks if block.mixture is None]
        self.head_width, self.kv_heads = head_width, k.m // head_width
        self._function = library.functions.llmquant_decode
        layers = list(map(_layer, blocks))
        self._held = blocks, final_gain, layers  # the structures below only point to their tensors and experts
        self._layers = (_Layer * len(blocks))(*layers)
        self._step = _Step(
            layers=self._layers,
            final_gain=final_gain.data_ptr(),
            layer_count=len(blocks),
            hidden=len(final_gain),
            ffn=dense[0] if dense else 0,
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
    tasks = dict(zip(LINEARS, map(_task, block.linears), strict=False))
    gains = {name: gain.data_ptr() for name in GAINS if (gain := getattr(block, name)) is not None}
    mixture = {} if block.mixture is None else {"mixture": _mixture(block.mixture)}
    return _Layer(**tasks, **gains, **mixture)


def _mixture(mixture: Mixture) -> _Mixture:
    tasks = [_task(weight) for expert in mixture.experts for weight in expert]
    return _Mixture(
        router=mixture.router.data_ptr(),
        experts=(Task * len(tasks))(*tasks),
        count=len(mixture.experts),
        chosen=mixture.chosen,
        normalized=mixture.normalized,
    )


def _task(weight: Weight) -> Task:
    return Task(**weight_fields(weight.panels, weight.bias, weight.m, weight.n, weight.scheme, weight.planes))
