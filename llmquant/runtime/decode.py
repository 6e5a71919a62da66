"""Single tokens by the native library, inside of a transformers model of the Llama family.

Prompts, batches, sampling and whatever else is not one more token of one sequence stay with transformers. So does the
cache: it remains a `DynamicCache`, whose tensors become views of buffers that have room to grow.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from llmquant.kernels import ops  # noqa: F401  (defines torch.ops.llmquant)
from llmquant.kernels.cpu import PLANES
from llmquant.kernels.decode import HEAD_MULTIPLE, Block, Steps, Weight
from llmquant.kernels.layout import KINDS
from llmquant.native import Library, find_library
from llmquant.runtime.linear import QuantLinear

# Whose layers are those of csrc/cpu/decode.h, with the modules below in them.
FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model")
LINEARS = (
    *(("self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")),
)
NORMS = ("input_layernorm", "post_attention_layernorm")
ROTATIONS = ("default", "linear", "llama3", "yarn")  # that depend on the position alone
CACHE = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"
DENSE = torch.ops.llmquant.dense.default
FEW = 4  # tokens whose product with the head takes as long as reading it
ROOM = 256  # keys that a buffer begins with


class Head(nn.Linear):
    """The output head, whose weight is not packed: what it takes for a few tokens is the time to read it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        alike = x.dtype == weight.dtype in KINDS and x.device.type == weight.device.type == "cpu"
        if alike and not tracked and self.bias is None and 0 < x.numel() <= FEW * self.in_features:
            return DENSE(x.contiguous(), weight)
        # Flat: torch copies the whole weight for the product with a slice of a batch.
        flat = nn.functional.linear(x.reshape(-1, self.in_features), weight, self.bias)
        return flat.view(*x.shape[:-1], self.out_features)


class _Place(NamedTuple):
    """A module in its place, which is an entry of another one's modules."""

    modules: dict[str, nn.Module | None]
    name: str
    module: nn.Module


@dataclass
class _Room:
    """Keys and values of one cache: buffers [1, kv_heads, capacity, head_width] for each layer."""

    keys: list[Tensor]
    values: list[Tensor]
    views: list[tuple[Tensor, Tensor]]  # that the cache was last given


class Decoder:
    """Stands in for the forward pass of a base model; see the module's docstring."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._forward = type(base).forward
        self._steps: Steps | None = None
        self._state: tuple[Any, ...] = ()
        self._places: list[_Place] = []
        self._linears: list[QuantLinear] = []  # that stand there
        self._rotation: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._rooms: WeakKeyDictionary[DynamicCache, _Room] = WeakKeyDictionary()
        self._held: _Room | None = None  # that the native steps point to
        self._one = Lock()  # the native steps are those of one token at a time

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin anew: what is kept here points to the tensors of the original."""
        return {"base": self._base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["base"])  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache: Any = kwargs.get(CACHE)
        if not args and not torch.compiler.is_compiling():
            with self._one:
                if self._serves(cache, kwargs) and (before := self._length(cache)):
                    return self._take(cache, before, kwargs)
        return self._forward(self._base, *args, **kwargs)

    def _serves(self, cache: Any, asked: dict[str, Any]) -> bool:
        """Whether this is one more token of one sequence, and nothing but its state is asked for."""
        ids, mask, config = asked.get("input_ids"), asked.get("attention_mask"), self._base.config
        if ids is None or ids.shape != (1, 1) or type(cache) is not DynamicCache or torch.is_grad_enabled():
            return False
        if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
            return False
        wanted = ("output_attentions", "output_hidden_states")
        if any(asked.get(name) or getattr(config, name, False) for name in wanted):
            return False
        return asked.get("inputs_embeds") is None and self._ready()

    def _length(self, cache: Any) -> int:
        """Keys that every layer of the cache holds; 0 if they are not there, or not alike."""
        layers = cache.layers
        if len(layers) != len(self._base.layers) or any(type(layer) is not DynamicLayer for layer in layers):
            return 0
        lengths = {layer.get_seq_length() for layer in layers}
        return lengths.pop() if len(lengths) == 1 else 0

    def _ready(self) -> bool:
        """Whether the native steps are those of the model as it is now."""
        if self._now() != self._state or not _stand(self._places):
            self._places = list(_places(self._base))
            self._linears = [place.module for place in self._places if isinstance(place.module, QuantLinear)]
            free = _stand(self._places)
            self._steps = self._build() if free else None
            self._state = self._now() if free else ()  # who listens may leave: look again
        return self._steps is not None

    def _now(self) -> tuple[Any, ...]:
        """What changes when the tensors that the native steps point to, or how they compute, do."""
        norm = self._base.norm.weight
        return norm.data_ptr(), norm.dtype, QuantLinear.changes, *[linear.precision for linear in self._linears]

    def _build(self) -> Steps | None:
        """None where a module is not one that the native steps know."""
        base, library = self._base, find_library()
        dtype = base.norm.weight.dtype
        layers = list(base.layers)
        linears = [[getattr(getattr(layer, owner), name) for owner, name in LINEARS] for layer in layers]
        gains = [getattr(layer, name).weight for layer in layers for name in NORMS] + [base.norm.weight]
        known = [isinstance(linear, QuantLinear) and linear.order is None for linear in chain(*linears)]
        if not isinstance(library, Library) or not all(known):
            return None
        if dtype not in KINDS or any(gain.dtype != dtype or gain.device.type != "cpu" for gain in gains):
            return None
        self._rooms.clear()
        self._held = None
        blocks = [
            Block(tuple(map(_weight, row)), layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
            for row, layer in zip(linears, layers, strict=True)
        ]
        attention = layers[0].self_attn
        eps, scale = base.norm.variance_epsilon, attention.scaling
        return Steps(library, blocks, base.norm.weight, head_width=attention.head_dim, eps=eps, scale=scale)

    def _take(self, cache: Any, before: int, asked: dict[str, Any]) -> BaseModelOutputWithPast:
        assert self._steps is not None  # noqa: S101  (`_serves` has seen to it)
        room = self._room(cache, before)
        positions = asked.get("position_ids")
        position = before if positions is None else int(positions.reshape(-1)[-1])
        cosines, sines = self._rotated(position)
        state = self._base.embed_tokens(asked["input_ids"]).reshape(-1).clone()
        self._steps.take(state, cosines[position], sines[position], before)
        for i, layer in enumerate(cache.layers):
            layer.keys, layer.values = room.views[i] = (
                room.keys[i].narrow(2, 0, before + 1),
                room.values[i].narrow(2, 0, before + 1),
            )
        result: dict[str, Any] = {"last_hidden_state": state.view(1, 1, -1), CACHE: cache}
        return BaseModelOutputWithPast(**result)

    def _room(self, cache: Any, before: int) -> _Room:
        """Buffers that hold what the cache holds, and have room for one more."""
        assert self._steps is not None  # noqa: S101
        room = self._rooms.get(cache)
        own = room is not None and all(
            layer.keys is keys and layer.values is values
            for layer, (keys, values) in zip(cache.layers, room.views, strict=True)
        )
        if room is None or not own or before >= room.keys[0].shape[2]:
            keys, values = ([_copied(getattr(layer, name)) for layer in cache.layers] for name in ("keys", "values"))
            room = self._rooms[cache] = _Room(keys, values, [(layer.keys, layer.values) for layer in cache.layers])
        if room is not self._held:
            self._steps.hold([keys[0] for keys in room.keys], [values[0] for values in room.values])
            self._held = room
        return room

    def _rotated(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, fp32 [positions, head_width], of this position and those before."""
        if position >= len(self._rotation[0]):
            positions = torch.arange(2 * max(position, ROOM)).unsqueeze(0)
            cosines, sines = self._base.rotary_emb(torch.empty(0), positions)
            self._rotation = cosines[0].float().contiguous(), sines[0].float().contiguous()
        return self._rotation


def _copied(states: Tensor) -> Tensor:
    """A buffer that begins with these keys or values and has room for as many again."""
    _, heads, length, width = states.shape
    buffer = states.new_zeros(1, heads, 2 * max(length, ROOM // 2), width)
    buffer[:, :, :length] = states
    return buffer


def _stand(places: list[_Place]) -> bool:
    """Whether each is where it was, and nobody listens to it; otherwise transformers has to be called."""
    for modules, name, module in places:  # every token passes here: 0.1 us each
        if modules.get(name) is not module or module._forward_hooks or module._forward_pre_hooks:
            return False
    return True


def _places(base: Any) -> Iterator[_Place]:
    """Every module that the native steps do the work of."""
    yield _Place(base._modules, "norm", base.norm)
    for index, layer in base.layers._modules.items():
        yield _Place(base.layers._modules, index, layer)
        for name in NORMS:
            yield _Place(layer._modules, name, layer._modules[name])
        for owner in dict.fromkeys(owner for owner, _ in LINEARS):
            yield _Place(layer._modules, owner, layer._modules[owner])
        for owner, name in LINEARS:
            inner = layer._modules[owner]
            yield _Place(inner._modules, name, inner._modules[name])


def _weight(linear: QuantLinear) -> Weight:
    m, n, planes = linear.out_features, linear.in_features, PLANES[linear.precision]
    return Weight(linear.packed, linear.bias, m, n, linear.scheme, planes)


def use_decoder(model: PreTrainedModel) -> None:
    """Let single tokens pass natively, and the head be read as fast as memory is, where the model is one for it."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = Head  # and not another module in its place: the weight may be tied, and known by its name
    base, config = model.base_model, model.config
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    plain = getattr(config, "hidden_act", None) == "silu" and rotation in ROTATIONS and window is None
    served = type(base).__name__ in FAMILIES and plain and width % HEAD_MULTIPLE == 0
    if served and isinstance(find_library(), Library):
        base.forward = Decoder(base)
