"""Single tokens by the native library, inside of a transformers model of the Llama family or a mixture of experts.

Prompts, batches, sampling and whatever else is not one more token of one sequence stay with transformers. So does the
cache: it remains a `DynamicCache`, whose tensors become views of buffers that have room to grow. `next_logits` takes
one more token of several sequences at once, each with a cache of its own.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from llmquant.kernels import ops  # noqa: F401  (defines torch.ops.llmquant)
from llmquant.kernels.cpu import PLANES
from llmquant.kernels.decode import HEAD_MULTIPLE, Block, Buffers, Mixture, Place, Steps, Weight
from llmquant.kernels.layout import KINDS
from llmquant.model.experts import Experts
from llmquant.model.noted import Noted
from llmquant.native import Library, find_library
from llmquant.runtime.linear import QuantLinear

# Whose layers are those of csrc/cpu/decode.h, with the modules below in them.
MIXTURES = ("MixtralModel", "Qwen3MoeModel")
FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", *MIXTURES)
CAUSAL = tuple(name.replace("Model", "ForCausalLM") for name in FAMILIES)  # nothing comes after their heads
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ROUTERS = ("MixtralTopKRouter", "Qwen3MoeTopKRouter")
UNSERVED = ("output_attentions", "output_hidden_states", "output_router_logits")  # what only transformers tells
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = ("q_norm", "k_norm")  # in self_attn, where there are such
ROTATIONS = ("default", "linear", "llama3", "yarn")  # that depend on the position alone
CACHE = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"
DENSE = torch.ops.llmquant.dense.default
FEW = 4  # tokens whose product with the head takes as long as reading it
ROOM = 256  # keys that a buffer begins with


class Head(nn.Linear):
    """The output head, whose weight is not packed: what it takes for a few tokens is the time to read it."""

    def reads(self, dtype: torch.dtype) -> bool:
        """Whether the native product serves activations of this dtype on the CPU."""
        return self.weight.dtype == dtype in KINDS and self.weight.device.type == "cpu" and self.bias is None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        few = x.device.type == "cpu" and 0 < x.numel() <= FEW * self.in_features
        if few and not tracked and self.reads(x.dtype):
            return DENSE(x.contiguous(), weight)
        # Flat: torch copies the whole weight for the product with a slice of a batch.
        flat = nn.functional.linear(x.reshape(-1, self.in_features), weight, self.bias)
        return flat.view(*x.shape[:-1], self.out_features)


class _Module(NamedTuple):
    """A module in its place, which is an entry of another one's modules."""

    modules: dict[str, nn.Module | None]
    name: str
    module: nn.Module
    noted: bool = False  # `Noted.changes` says that it was replaced, or is listened to


class _Token(NamedTuple):
    """One more of a sequence whose cache holds `before` keys."""

    cache: Any
    before: int
    position: int


@dataclass
class _Room:
    """Keys and values of one cache: buffers [1, kv_heads, capacity, head_width] for each layer."""

    buffers: Buffers
    views: list[tuple[Tensor, Tensor]]  # that the cache was last given


class Decoder:
    """Stands in for the forward pass of a base model; see the module's docstring."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._forward = type(base).forward
        self._steps: Steps | None = None
        self._state: tuple[Any, ...] = ()
        self._near: list[_Module] = []  # modules to be looked at for each token
        self._rotation: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._rooms: WeakKeyDictionary[DynamicCache, _Room] = WeakKeyDictionary()
        self._one = Lock()  # the native steps are one call's at a time

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
                    positions = kwargs.get("position_ids")
                    position = before if positions is None else int(positions.reshape(-1)[-1])
                    states = self._take(kwargs["input_ids"].reshape(1), [_Token(cache, before, position)])
                    result: dict[str, Any] = {"last_hidden_state": states.unsqueeze(0), CACHE: cache}
                    mixture = type(self._base).__name__ in MIXTURES
                    return MoeModelOutputWithPast(**result) if mixture else BaseModelOutputWithPast(**result)
        return self._forward(self._base, *args, **kwargs)

    def together(self, ids: Tensor, caches: Sequence[Any]) -> Tensor | None:
        """States [tokens, hidden] after one more token of each of several sequences, as a call gives each alone.

        None if there are none that the native steps serve; the caches then hold what they held.
        """
        with self._one:
            alike = all(type(cache) is DynamicCache for cache in caches) and len({*map(id, caches)}) == len(ids) > 0
            if torch.is_grad_enabled() or not alike:
                return None
            lengths = [self._length(cache) for cache in caches]
            if not all(lengths) or not self._ready():
                return None
            return self._take(ids, [_Token(*each) for each in zip(caches, lengths, lengths, strict=True)])

    def _serves(self, cache: Any, asked: dict[str, Any]) -> bool:
        """Whether this is one more token of one sequence, and nothing but its state is asked for."""
        ids, mask, config = asked.get("input_ids"), asked.get("attention_mask"), self._base.config
        if ids is None or ids.shape != (1, 1) or type(cache) is not DynamicCache or torch.is_grad_enabled():
            return False
        if mask is not None and (isinstance(mask, dict) or mask.dim() != 2 or not bool(mask.all())):
            return False
        if any(asked.get(name) or getattr(config, name, False) for name in UNSERVED):
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
        if self._now() != self._state or not _stand(self._near):
            modules = list(_modules(self._base))
            self._near = [place for place in modules if not place.noted]
            free = _stand(modules)
            self._steps = self._build() if free else None
            self._state = self._now() if free else ()  # who listens may leave: look again
        return self._steps is not None

    def _now(self) -> tuple[Any, ...]:
        """What changes when the tensors that the native steps point to, or how they compute, do."""
        norm = self._base.norm.weight
        return norm.data_ptr(), norm.dtype, Noted.changes

    def _build(self) -> Steps | None:
        """None where a module is not one that the native steps know."""
        base, library = self._base, find_library()
        dtype = base.norm.weight.dtype
        layers = list(base.layers)
        linears = [linear for layer in layers for linear in chain(*_linears(layer))]
        routers = [layer.mlp.gate for layer in layers if _is_mixture(layer)]
        if any(type(router).__name__ not in ROUTERS for router in routers):
            return None
        gains = chain.from_iterable(map(_gains, layers))
        dense = [base.norm.weight, *gains, *(router.weight for router in routers)]
        known = [isinstance(linear, QuantLinear) and linear.order is None for linear in linears]
        if not isinstance(library, Library) or not all(known) or dtype not in KINDS:
            return None
        if any(weight.dtype != dtype or weight.device.type != "cpu" for weight in dense):
            return None
        self._rooms.clear()
        blocks = list(map(_block, layers))
        attention = layers[0].self_attn
        eps, scale = base.norm.variance_epsilon, attention.scaling
        return Steps(library, blocks, base.norm.weight, head_width=attention.head_dim, eps=eps, scale=scale)

    def _take(self, ids: Tensor, tokens: Sequence[_Token]) -> Tensor:
        """States [tokens, hidden] after these tokens, which their caches then hold."""
        assert self._steps is not None  # noqa: S101  (`_ready` has seen to it)
        rooms = [self._room(token) for token in tokens]
        cosines, sines = self._rotated(max(token.position for token in tokens))
        states = self._base.embed_tokens(ids).to(self._base.norm.weight.dtype, copy=True)
        self._steps.take(
            states,
            [
                Place(room.buffers, token.before, cosines[token.position], sines[token.position])
                for room, token in zip(rooms, tokens, strict=True)
            ],
        )
        for room, token in zip(rooms, tokens, strict=True):
            for i, layer in enumerate(token.cache.layers):
                layer.keys, layer.values = room.views[i] = (
                    room.buffers.keys[i].narrow(2, 0, token.before + 1),
                    room.buffers.values[i].narrow(2, 0, token.before + 1),
                )
        return states

    def _room(self, token: _Token) -> _Room:
        """Buffers that hold what the cache holds, and have room for one more."""
        assert self._steps is not None  # noqa: S101
        layers, room = token.cache.layers, self._rooms.get(token.cache)
        own = room is not None and all(
            layer.keys is keys and layer.values is values
            for layer, (keys, values) in zip(layers, room.views, strict=True)
        )
        if room is None or not own or token.before >= room.buffers.capacity:
            held, dtype = [(layer.keys, layer.values) for layer in layers], self._base.norm.weight.dtype
            wanted = 1, self._steps.kv_heads, token.before, self._steps.head_width
            if any(part.shape != wanted for part in chain(*held)):
                raise RuntimeError(f"the cache holds {tuple(held[0][0].shape)}; this model has {wanted}")
            keys, values = ([_copied(part, dtype) for part in side] for side in zip(*held, strict=True))
            room = _Room(Buffers(keys, values), held)
            self._rooms[token.cache] = room
        return room

    def _rotated(self, position: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, fp32 [positions, head_width], of this position and those before."""
        if position >= len(self._rotation[0]):
            positions = torch.arange(2 * max(position, ROOM)).unsqueeze(0)
            cosines, sines = self._base.rotary_emb(torch.empty(0), positions)
            self._rotation = cosines[0].float().contiguous(), sines[0].float().contiguous()
        return self._rotation


def _copied(states: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer that begins with these keys or values and has room for as many again."""
    _, heads, length, width = states.shape
    buffer = states.new_zeros(1, heads, 2 * max(length, ROOM // 2), width, dtype=dtype)
    buffer[:, :, :length] = states
    return buffer


def _stand(modules: list[_Module]) -> bool:
    """Whether each is where it was, and nobody listens to it; otherwise transformers has to be called."""
    for place, name, module, _ in modules:  # every token passes here: 0.1 us each
        if place.get(name) is not module or _is_heard(module):
            return False
    return True


def _is_heard(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _modules(base: Any) -> Iterator[_Module]:
    """Every module that the native steps do the work of."""
    yield _Module(base._modules, "norm", base.norm)
    for index, layer in base.layers._modules.items():
        yield _Module(base.layers._modules, index, layer)
        for name in NORMS:
            yield _Module(layer._modules, name, layer._modules[name])
        for owner in ("self_attn", "mlp"):
            yield _Module(layer._modules, owner, layer._modules[owner])
        attention, block = layer.self_attn, layer.mlp
        yield from _named(attention, (*ATTENTION, *(name for name in HEAD_NORMS if name in attention._modules)))
        if not _is_mixture(layer):
            yield from _named(block, FEED_FORWARD)
            continue
        yield from _named(block, ("gate", "experts"))
        for number, expert in block.experts._modules.items():
            yield _Module(block.experts._modules, number, expert, noted=True)
            yield from _named(expert, FEED_FORWARD, noted=True)


def _named(owner: Any, names: Iterable[str], *, noted: bool = False) -> Iterator[_Module]:
    for name in names:
        yield _Module(owner._modules, name, owner._modules[name], noted)


def _is_mixture(layer: Any) -> bool:
    """Whether experts stand in its feed-forward block."""
    return isinstance(getattr(layer.mlp, "experts", None), Experts)


def _linears(layer: Any) -> tuple[list[Any], ...]:
    """Those of its attention and its feed-forward block, or of each expert, in the order of `Block` and `Mixture`."""
    blocks = layer.mlp.experts if _is_mixture(layer) else [layer.mlp]
    attention = [getattr(layer.self_attn, name) for name in ATTENTION]
    return attention, *([getattr(block, name) for name in FEED_FORWARD] for block in blocks)


def _block(layer: Any) -> Block:
    attention, *feed_forward = (tuple(map(_weight, linears)) for linears in _linears(layer))
    if not _is_mixture(layer):
        return Block((*attention, *feed_forward[0]), *_gains(layer))
    router = layer.mlp.gate
    normalized = getattr(router, "norm_topk_prob", True)  # of Mixtral they always are
    mixture = Mixture(router.weight, tuple(feed_forward), router.top_k, normalized)
    return Block(attention, *_gains(layer), mixture=mixture)


def _gains(layer: Any) -> Iterator[Tensor]:
    """Of a layer's norms, in the order of `Block`."""
    yield from (getattr(layer, name).weight for name in NORMS)
    yield from (getattr(layer.self_attn, name).weight for name in HEAD_NORMS if hasattr(layer.self_attn, name))


def _weight(linear: QuantLinear) -> Weight:
    m, n, planes = linear.out_features, linear.in_features, PLANES[linear.precision]
    return Weight(linear.packed, linear.bias, m, n, linear.scheme, planes)


def use_decoder(model: PreTrainedModel) -> None:
    """Let single tokens pass natively, and the head be read as fast as memory is, where the model is one for it."""
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = Head  # and not another module in its place: the weight may be tied, and known by its name
    base, config = model.base_model, model.config
    if type(base).__name__ not in FAMILIES:
        return
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    plain = getattr(config, "hidden_act", None) == "silu" and rotation in ROTATIONS and window is None
    if plain and width % HEAD_MULTIPLE == 0 and isinstance(find_library(), Library):
        base.forward = Decoder(base)


def next_logits(model: PreTrainedModel, ids: Sequence[int], caches: Sequence[Any]) -> Tensor | None:
    """Logits [tokens, vocab] of what comes after one more token of each of several sequences.

    Each has a cache of its own, which then holds its token, and is given the same logits, bit for bit, whatever the
    others are. None where transformers has to be called: the caches then hold what they held.
    """
    base: Any = model.base_model
    head, decoder = model.get_output_embeddings(), vars(base).get("forward")
    known = type(model).__name__ in CAUSAL and "forward" not in vars(model)
    if not known or not isinstance(decoder, Decoder) or type(head) is not Head:
        return None
    if any(map(_is_heard, (model, base, head))) or not head.reads(base.norm.weight.dtype):
        return None
    states = decoder.together(torch.tensor(ids), caches)
    return None if states is None else DENSE(states, head.weight)
