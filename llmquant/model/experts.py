"""Mixtures of experts with one linear for each matrix of each expert, as checkpoints and servers have them.

transformers keeps all experts of a layer in two tensors of three dimensions. Here they are modules again, so that
whatever deals with linears (layout, solvers, layouts of files, kernels) deals with experts, too.

A token that was not sent to an expert says little of its inputs, but more than nothing: while a model is calibrated
each expert is also shown some tokens of others, its guests. What it makes of them is dropped; its Hessian has them at
`GUEST_WEIGHT`. So an expert that few tokens of the calibration text chose, or none, is still solved for inputs of its
layer, and one that many chose is hardly moved.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmquant.errors import ArchitectureError
from llmquant.model.noted import Noted

GUEST_WEIGHT = 1 / 16  # of a token's share in the Hessian; there are as many guests as there would be even shares

# What transformers says of an experts module that computes down(act(gate(x)) * up(x)) from [gate; up] and down, or
# down(act(up(x))) from up and down.
PLAIN = {
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
GATE = "_default_apply_gate"
ROUTER = "router"  # of experts that stand in the layer itself, as those of Gemma 4


class Routed(NamedTuple):
    """Which tokens of a batch the rows of an expert's input are: first those that chose it, then guests."""

    tokens: Tensor  # int64 [rows], of B * T
    chosen: int


class Expert(Noted):
    """A feed-forward block, gated or not, with the activation of a fused one."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        _, hidden, inner = fused.down_proj.shape
        like = {"device": fused.down_proj.device, "dtype": fused.down_proj.dtype}
        self.gate_proj = nn.Linear(hidden, inner, bias=False, **like) if fused.has_gate else None
        self.up_proj = nn.Linear(hidden, inner, bias=False, **like)
        self.down_proj = nn.Linear(inner, hidden, bias=False, **like)
        self.act_fn: Any = getattr(fused, "act_fn", None)
        self.apply_gate: Any = None if _gates_plainly(fused) else fused._apply_gate

    def inner(self, x: Tensor) -> Tensor:
        """The input of `down_proj`."""
        if self.gate_proj is None:
            inner: Tensor = self.act_fn(self.up_proj(x))
        elif self.apply_gate is None:
            inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        else:
            inner = self.apply_gate(torch.cat((self.gate_proj(x), self.up_proj(x)), -1))
        return inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.inner(x))
        return y


class Experts(Noted, nn.ModuleList):
    """The experts of a layer, in the place and with the interface of transformers' module."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden] to [tokens, hidden]; `index` and `weights` [tokens, k] say by which experts.

        Raises ValueError for other shapes, which a family may have that we do not know.
        """
        _check(x, index, weights)
        out = torch.zeros_like(x)
        for number, tokens, places in sent(index, len(self)):
            out.index_add_(0, tokens, (self[number](x[tokens]) * weights[tokens, places, None]).to(out.dtype))
        return out

    def everywhere(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """All experts for all tokens, each from a copy of `x` of its own: no shape depends on a value."""
        _check(x, index, weights)
        out = torch.zeros_like(x)
        for expert in self:
            out = out + expert(x.clone())
        return out


class CalibratedExperts(Experts):
    """Experts that are all called, in their order, for the tokens that chose them and for guests.

    The inputs of their linears say in `routed` which tokens they are.
    """

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        _check(x, index, weights)
        out = torch.zeros_like(x)
        everyone, step = torch.arange(len(x), device=x.device), max(1, len(self) // index.shape[1])
        own = {number: (tokens, places) for number, tokens, places in sent(index, len(self))}
        for number in range(len(self)):
            expert: Any = self[number]
            tokens, places = own.get(number, (everyone[:0], everyone[:0]))
            routed = Routed(torch.cat([tokens, everyone[number % step :: step]]), len(tokens))
            inner = expert.inner(_marked(x[routed.tokens], routed))
            y = expert.down_proj(_marked(inner, routed))[: routed.chosen]
            out.index_add_(0, tokens, (y * weights[tokens, places, None]).to(out.dtype))
        return out


def _check(x: Tensor, index: Tensor, weights: Tensor) -> None:
    if x.dim() != 2 or index.dim() != 2 or index.shape != weights.shape or len(index) != len(x):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (x, index, weights))
        raise ValueError(f"experts: {shapes} are no tokens, their experts and their weights")


def _marked(x: Tensor, routed: Routed) -> Tensor:
    x.routed = routed  # type: ignore[attr-defined]
    return x


def routed(x: Tensor) -> Routed | None:
    """What the input of an expert's linear says; None for any other tensor."""
    return getattr(x, "routed", None)


def sent(index: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Experts that tokens chose, these in order, and in which of their k places; `index` int64 [tokens, k].

    An index of `count` is nobody's. Of hundreds of experts a token chooses a few: the others cost nothing here.
    """
    flat, k = index.reshape(-1), index.shape[1]
    rows = flat.argsort(stable=True)
    numbers, counts = flat[rows].unique_consecutive(return_counts=True)
    sizes = counts.tolist()
    for number, tokens, places in zip(numbers.tolist(), (rows // k).split(sizes), (rows % k).split(sizes), strict=True):
        if number < count:
            yield number, tokens, places


def unfuse(model: nn.Module, *, calibrated: bool = False) -> None:
    """Put experts of linears in the place of fused ones; their weights are new, on the same device.

    Raises:
        ArchitectureError: experts of another kind than `PLAIN`.
    """
    for name, module in list(model.named_modules()):
        if not hasattr(module, "has_gate"):
            continue
        fused: Any = module
        if any(getattr(fused, option, value) != value for option, value in PLAIN.items()):
            raise ArchitectureError(
                f"{name}: {type(fused).__name__} is not made of gate, up and down alone; "
                "this architecture is not supported"
            )
        kind = CalibratedExperts if calibrated else Experts
        experts = kind(Expert(fused) for _ in range(len(fused.down_proj)))
        for weight in ("gate_up_proj", "up_proj", "down_proj"):  # what gates may live on, without them
            fused._parameters.pop(weight, None)
        model.set_submodule(name, experts.train(fused.training))


def _gates_plainly(fused: Any) -> bool:
    """act(gate) * up, as transformers adds it where a family has no other."""
    return getattr(getattr(fused, "_apply_gate", None), "__name__", GATE) == GATE


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, Experts) for module in model.modules())


def without_guests(module: nn.Module) -> None:
    """Let experts that nothing is learned from receive their own tokens alone."""
    for experts in module.modules():
        if isinstance(experts, CalibratedExperts):
            experts.__class__ = Experts  # type: ignore[assignment]


def routers(layer: nn.Module) -> list[str]:
    """Modules that decide where tokens go, or what an expert counts: beside experts, a row for each of them, or one.

    Raises:
        ArchitectureError: the experts stand neither in a block of their own nor, in the layer itself, beside a router.
    """
    found = []
    for name, experts in layer.named_modules():
        if not isinstance(experts, Experts):
            continue
        block = name.rpartition(".")[0] or ROUTER
        if not hasattr(layer, block.partition(".")[0]):
            raise ArchitectureError(f"{name}: experts without a router; this architecture is not supported")
        for beside, module in layer.get_submodule(block).named_modules(prefix=block):
            weight = None if beside.startswith(f"{name}.") else module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and len(weight) in (1, len(experts)):
                found.append(beside)
    return found
