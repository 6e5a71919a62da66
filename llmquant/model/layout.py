"""The structure of a model, derived by watching one forward pass that computes nothing.

The model is built of fake tensors (shapes without storage) and called once. Hooks see in which
order its linears run, which of them receive the same tensor, and which norm produced it. So
groups and fold pairs come from what the code does; the only knowledge kept as data is what no
hook can see: whether a norm's gain is stored as an offset from one, and which linears multiply
elementwise into which. Where a layer has experts, all of them are called for all tokens.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llmquant.errors import ArchitectureError
from llmquant.model.experts import Experts, routers
from llmquant.model.shell import empty_model
from llmquant.model.watch import Call, Kept, Watch, watch


class Family(NamedTuple):
    """What the module tree does not tell about a model type."""

    norm_offset: float | None = 0.0  # the norm multiplies by (weight + norm_offset); None: unknown
    attention: tuple[str, str] | None = None  # (source, target): source's last rows feed target's columns one to one
    mlp: tuple[str, str] | None = None


LLAMA = Family(attention=("self_attn.v_proj", "self_attn.o_proj"), mlp=("mlp.up_proj", "mlp.down_proj"))
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mixtral": LLAMA,
    "qwen2_moe": LLAMA,
    "qwen3_moe": LLAMA,
    "olmoe": LLAMA,
    "glm4_moe": LLAMA,
    "deepseek_v3": Family(mlp=LLAMA.mlp),
    "gemma2": LLAMA._replace(norm_offset=1.0),
    "gemma3_text": LLAMA._replace(norm_offset=1.0),
    "phi3": Family(attention=("self_attn.qkv_proj", "self_attn.o_proj"), mlp=("mlp.gate_up_proj", "mlp.down_proj")),
    "qwen3_next": Family(norm_offset=1.0, mlp=LLAMA.mlp),
    "qwen3_5_text": Family(norm_offset=1.0, mlp=LLAMA.mlp),
    "qwen3_5_moe_text": Family(norm_offset=1.0, mlp=LLAMA.mlp),
    # ReLU commutes with a positive scale, so fc1 folds into fc2 although it stands before the activation.
    "opt": Family(attention=("self_attn.v_proj", "self_attn.out_proj"), mlp=("fc1", "fc2")),
    "gpt_neox": Family(),
}


# What a linear attention forgets by and writes by, a row or two for each head; what DeepSeek's sparse attention chooses
# tokens by, and what it compresses them with. They are kept as they are: they are few, what they say is multiplied up
# over all tokens that follow, and vLLM makes linears of wk and weights_proj, and of compressors, that stay in 16 bits.
GATES = (
    ".in_proj_a", ".in_proj_b", ".in_proj_ba", ".linear_attn.a_proj", ".linear_attn.b_proj",
    ".indexer.wk", ".weights_proj", ".indexer.kv_proj", ".indexer.gate_proj",
    ".compressor.kv_proj", ".compressor.gate_proj",
)  # fmt: skip
STRAY = 1 / 8  # of a layer's weights may belong to no linear, as what a state space decays by: kept, and said


@dataclass(frozen=True)
class Group:
    """Linears that receive the same tensor, in the order they are called."""

    linears: tuple[str, ...]
    norm: str | None  # the norm whose output they receive
    foldable: bool = True  # scales on their columns fold into the norm's gain: nothing else receives what it makes
    expert: bool = False  # they are an expert's, and receive the tokens that are sent to it


@dataclass(frozen=True)
class Layer:
    """One decoder layer."""

    name: str
    groups: tuple[Group, ...]  # in the order of the forward pass
    folds: tuple[tuple[str, str], ...]  # (source, target): scales on target's columns fold into source's last rows
    returned: int  # how much the tuple holds that its forward pass returns; 0: it returns hidden states alone
    norm_offset: float | None = None  # of the norms, which multiply by (weight + it); None: unknown, nothing folds
    handed: tuple[tuple[str, int], ...] = ()  # arguments that are a part of what the layer before returned, and where

    def as_returned(self, states: Tensor) -> Any:
        """Hidden states as the forward pass returns them, with nothing for what else there is."""
        return (states, *[None] * (self.returned - 1)) if self.returned else states

    @property
    def experts(self) -> list[str]:
        """Their linears, in forward order."""
        return [name for group in self.groups if group.expert for name in group.linears]

    @property
    def mixture(self) -> str | None:
        """The block that experts, their router and what they share stand in; of experts in the layer itself, these."""
        if not self.experts:
            return None
        experts = self.experts[0].rsplit(".", 2)[0]
        block = experts.rpartition(".")[0]
        return experts if block == self.name else block


@dataclass(frozen=True)
class Layout:
    """A model as the quantizer sees it. All names are full module names."""

    model_type: str
    layers: tuple[Layer, ...]
    shapes: dict[str, tuple[int, int]]  # every nn.Linear -> (m, n)
    width: int  # numbers of a token's hidden states between layers
    kept: tuple[str, ...] = ()  # modules that send tokens to experts, gates, and linears whose weight others read
    strays: tuple[str, ...] = ()  # the few weights in layers that belong to no linear

    def linears(self) -> list[str]:
        """The linears inside decoder layers, in forward order, without those that are kept."""
        return [name for layer in self.layers for group in layer.groups for name in group.linears]


def derive_layout(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Layout:
    """Derive the layout of the causal language model that `config` describes.

    Raises:
        ArchitectureError: names what could not be derived.
    """
    model = empty_model(config, trust_remote_code=trust_remote_code)
    layers = decoder_layers(model, config)
    routing = tuple(f"{name}.{n}" for name, module in layers.items() for n in chain(routers(module), gates(module)))
    seen = watch(model, layers, routing)
    times = Counter(call.module for call in seen.calls if call.kind is nn.Linear)
    loose = seen.read | seen.other | {linear for linear, count in times.items() if count > 1}
    calls = [call._replace(kind=Kept) if call.module in loose else call for call in seen.calls]
    kept = (*routing, *sorted(loose - {*routing}))
    strays = chain.from_iterable(_strays(name, module, config, routing, loose) for name, module in layers.items())
    family = FAMILIES.get(config.model_type, Family(norm_offset=None))
    return Layout(
        model_type=config.model_type,
        layers=tuple(_layer(name, module, calls, family, config, kept, seen) for name, module in layers.items()),
        shapes={n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)},
        width=seen.width,
        kept=kept,
        strays=tuple(strays),
    )


def gates(layer: nn.Module) -> list[str]:
    """The linears of a layer that are `GATES`."""
    return [n for n, module in layer.named_modules() if isinstance(module, nn.Linear) and f".{n}".endswith(GATES)]


def decoder_layers(model: PreTrainedModel, config: PretrainedConfig) -> dict[str, nn.Module]:
    """The decoder layers by full name: the one list of `num_hidden_layers` modules that hold linears."""
    count = getattr(config, "num_hidden_layers", None)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and not isinstance(module, Experts)
        and len(module) == count
        and all(any(isinstance(m, nn.Linear) for m in layer.modules()) for layer in module)
    }
    if len(found) != 1:
        raise ArchitectureError(
            f"{config.model_type}: cannot derive the decoder layers: {len(found)} module lists have "
            f"num_hidden_layers={count} entries with linears{' (' + ', '.join(found) + ')' if found else ''}; "
            "this architecture is not supported"
        )
    ((name, layers),) = found.items()
    return {f"{name}.{i}": layer for i, layer in enumerate(layers)}


def _strays(
    name: str, layer: nn.Module, config: PretrainedConfig, routing: tuple[str, ...], loose: set[str]
) -> list[str]:
    """The weights of a layer that no linear owns: convolutions of single channels, what a state decays by.

    Raises:
        ArchitectureError: they, and those of linears that are `loose`, are more than a few, and would stay in 16 bits.
    """
    linears = {f"{n}.weight": m.weight for n, m in layer.named_modules(prefix=name) if isinstance(m, nn.Linear)}
    packed = {id(weight): weight.numel() for n, weight in linears.items() if n.removesuffix(".weight") not in loose}
    found = {
        parameter: tensor
        for parameter, tensor in layer.named_parameters(prefix=name)
        if tensor.dim() > 1
        and tensor.numel() > max(tensor.shape)
        and id(tensor) not in packed
        and not parameter.startswith(tuple(f"{router}." for router in routing))
    }
    if sum(tensor.numel() for tensor in found.values()) > STRAY * sum(packed.values()):
        largest = max(found, key=lambda parameter: found[parameter].numel())
        owned = largest in linears
        reason = "is no product of its own input alone" if owned else "belongs to no linear (fused experts?)"
        raise ArchitectureError(
            f"{config.model_type}: {largest} {tuple(found[largest].shape)} {reason}; this architecture is not supported"
        )
    return [parameter for parameter in found if parameter not in linears]


def _layer(
    name: str,
    module: nn.Module,
    calls: list[Call],
    family: Family,
    config: PretrainedConfig,
    kept: tuple[str, ...],
    seen: Watch,
) -> Layer:
    inside = [call for call in calls if call.module.startswith(name + ".")]
    produced_by_norm = {call.result: call.module for call in inside if call.kind is nn.Module}
    # Experts and what is kept receive what a norm makes, too: no scale on the columns of a group folds into it.
    shared = {call.module: call.source for call in inside if call.kind in (Experts, Kept)}
    members: dict[int, list[str]] = {}
    for call in inside:
        if call.kind is nn.Linear:
            members.setdefault(call.source, []).append(call.module)
    called = {linear for names in members.values() for linear in names}
    linears = {f"{name}.{n}" for n, m in module.named_modules() if isinstance(m, nn.Linear)} - set(kept)
    if missed := sorted(linears - called):
        raise ArchitectureError(
            f"{config.model_type}: cannot derive the input of {missed[0]}: the forward pass never calls it"
        )
    groups = []
    for source, names in members.items():
        experts = next((each for each in shared if names[0].startswith(f"{each}.")), None)
        if experts and not names[0].endswith(".down_proj"):
            source = shared[experts]  # of which each expert receives some tokens
        norm = produced_by_norm.get(source)
        groups.append(Group(tuple(names), norm, source not in shared.values(), experts is not None))
    returned, handed = seen.returned.get(name, 0), tuple(seen.handed.items())
    return Layer(name, tuple(groups), _folds(name, linears, family, config), returned, family.norm_offset, handed)


def _folds(name: str, linears: set[str], family: Family, config: PretrainedConfig) -> tuple[tuple[str, str], ...]:
    """Linear-to-linear fold pairs of one layer. With grouped-query attention one value row feeds several columns."""
    pairs = []
    if family.attention and getattr(config, "num_key_value_heads", None) in (None, config.num_attention_heads):
        pairs.append(family.attention)
    if family.mlp and getattr(config, "activation_function", "relu") == "relu":  # OPT: only ReLU lets a scale through
        pairs.append(family.mlp)
    named = [(f"{name}.{source}", f"{name}.{target}") for source, target in pairs]
    return tuple(pair for pair in named if pair[0] in linears and pair[1] in linears)
