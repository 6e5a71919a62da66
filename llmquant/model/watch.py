"""One forward pass of a fake model, watched: what its linears, norms and layers receive and make."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from llmquant.errors import ArchitectureError
from llmquant.model.experts import Experts

BATCH, TOKENS = 1, 8


class Kept:
    """The kind of a linear that is kept as it is."""


class Call(NamedTuple):
    module: str
    kind: type  # nn.Linear, Kept, Experts, or nn.Module for norms
    source: int  # storage of the input
    result: int  # storage of the output


@dataclass
class Watch:
    """What was seen.

    Attributes:
        routing: modules that are kept, whatever they are.
        calls: of linears, experts and norms, in order.
        returned: by layer, how much the tuple holds that it returns; 0 where it returns hidden states alone.
        width: numbers of a token's hidden states between layers.
        handed: which argument of a layer was which part of what the one before returned.
        other: linears that multiply in another way than all do, as one of DeepSeek-V4 its groups.
        read: linears of layers whose weight was read by others than their own forward pass. A packed one has none.
    """

    routing: tuple[str, ...]
    calls: list[Call] = field(default_factory=list)
    returned: dict[str, int] = field(default_factory=dict)
    width: int = 0
    handed: dict[str, int] = field(default_factory=dict)
    other: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    _beside: dict[int, int] = field(default_factory=dict)  # what a layer returned beside hidden states, and where
    _alive: list[Any] = field(default_factory=list)  # what is freed could lend its identity to another

    def called(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        source = args[0] if args else next(iter(kwargs.values()))
        kind: type = next(kind for kind in (nn.Linear, Experts, nn.Module) if isinstance(module, kind))
        if name in self.routing:
            kind, out = Kept, source  # what a router makes is read by no linear, and may be no tensor
        out = out[0] if isinstance(out, tuple) else out  # of a router that is a linear, too
        if isinstance(module, nn.Linear) and kind is nn.Linear and not _is_product(module, source, out):
            self.other.add(name)
        self._alive += source, out
        self.calls.append(Call(name, kind, _storage(source), _storage(out)))

    def passed(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Raises NotImplementedError if layers pass on what a stream does not hold."""
        self.handed |= {argument: self._beside[id(v)] for argument, v in kwargs.items() if id(v) in self._beside}
        if any(id(argument) in self._beside for argument in args):
            raise NotImplementedError(f"{name} receives more than hidden states from the layer before, without a name")
        states, *beside = out if isinstance(out, tuple) else (out,)
        if (BATCH, TOKENS) not in (states.shape[:2], states.shape[-3:-1]):
            raise NotImplementedError(f"{name} makes {tuple(states.shape)} of {BATCH} x {TOKENS} tokens")
        self.width = states.numel() // (BATCH * TOKENS)
        self._beside = {id(each): place for place, each in enumerate(beside, 1) if isinstance(each, Tensor)}
        self._alive += beside
        self.returned[name] = len(out) if isinstance(out, tuple) else 0


def watch(model: PreTrainedModel, layers: dict[str, nn.Module], routing: tuple[str, ...]) -> Watch:
    """Run a model without weights once, with tensors that have a shape alone; it cannot be used any more.

    Raises:
        ArchitectureError: it cannot be run, or its layers pass on what a stream of hidden states does not hold.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _fake(model, mode)
    seen = Watch(routing)
    inside = tuple(f"{layer}." for layer in layers)
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            module.forward = module.everywhere  # type: ignore[method-assign]
        if isinstance(module, nn.Linear) and name.startswith(inside):
            _tell_of_reading(module, partial(seen.read.add, name))
        if isinstance(module, nn.Linear | Experts) or type(module).__name__.endswith("Norm"):
            module.register_forward_hook(partial(seen.called, name), with_kwargs=True)
    for name, layer in layers.items():
        layer.register_forward_hook(partial(seen.passed, name), with_kwargs=True)
    try:
        with torch.no_grad(), mode:
            model(input_ids=torch.zeros(BATCH, TOKENS, dtype=torch.long), use_cache=False)
    except Exception as error:  # whatever a model's own code may raise: the cause goes into the message
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArchitectureError(
            f"{model.config.model_type}: cannot derive which linears share an input: its forward pass failed: {reason}"
        ) from error
    return seen


def _fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put shapes in the place of parameters and buffers, on the CPU; what is one tensor stays one."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        owned: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for own in owned:
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in made:
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = fake if own is module._buffers else nn.Parameter(fake, requires_grad=False)
                own[name] = None if tensor is None else made[id(tensor)]


def _tell_of_reading(linear: nn.Linear, tell: Callable[[], None]) -> None:
    """Call `tell` whenever the weight of a linear is read from outside of its forward pass."""
    inside = False

    def attribute(self: nn.Module, name: str) -> Any:
        if name == "weight" and not inside:
            tell()
        return nn.Module.__getattr__(self, name)

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        nonlocal inside
        inside = True
        try:
            return kind.forward(self, x)
        finally:
            inside = False

    kind = type(linear)
    linear.__class__ = type(kind.__name__, (kind,), {"__getattr__": attribute, "forward": forward})


def _is_product(linear: nn.Linear, x: Tensor, y: Tensor) -> bool:
    """Whether shapes are those of y = x W^T."""
    return x.shape[-1] == linear.in_features and y.shape == (*x.shape[:-1], linear.out_features)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
