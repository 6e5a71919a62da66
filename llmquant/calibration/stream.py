"""The calibration activations on their way through the model, one layer after another."""

import hashlib
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.calibration.batches import Batch
from llmquant.model.layout import Layer
from llmquant.model.shell import Shell

Observe = Callable[[Tensor, Tensor], None]  # (inputs [B, T, n] or [B * T, n], mask [B, T])


class _Reached(Exception):
    """Ends a forward pass at the linear whose input was wanted."""


def _observe_and_stop(observe: Observe, mask: Tensor, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    observe(args[0], mask)
    raise _Reached


class Stream:
    """Hidden states before the next decoder layer, one tensor [B, T, hidden] per batch.

    Everything that a layer receives besides hidden states (positions, masks) depends on the batch's
    shape alone, because sequences are padded on the right and the models are causal. It is recorded
    once per shape, by running the model with every layer's forward replaced by a recorder.
    """

    def __init__(self, shell: Shell, layers: tuple[Layer, ...], batches: tuple[Batch, ...]) -> None:
        self._shell = shell
        self._layers = {layer.name: shell.model.get_submodule(layer.name) for layer in layers}
        self._masks = [batch.mask.to(shell.device) for batch in batches]
        self._arguments: dict[torch.Size, dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._hidden = self._embed(layers, batches)

    @torch.no_grad()
    def _embed(self, layers: tuple[Layer, ...], batches: tuple[Batch, ...]) -> list[Tensor]:
        base = self._shell.model.base_model
        prefix = next(name for name, module in self._shell.model.named_modules() if module is base)
        inside = tuple(f"{layer.name}." for layer in layers)
        outside = [name for name in self._shell.part(prefix) if not name.startswith(inside)]
        hidden: list[Tensor] = []
        for layer in layers:
            module = self._layers[layer.name]
            module.forward = MethodType(self._recorder(layer, hidden, first=layer is layers[0]), module)
        try:
            with self._shell.filled(outside):
                for batch in batches:
                    base(input_ids=batch.input_ids.to(self._shell.device), use_cache=False)
        finally:
            for module in self._layers.values():
                del module.forward
        return hidden

    def _recorder(self, layer: Layer, hidden: list[Tensor], *, first: bool) -> Callable[..., Any]:
        def forward(module: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if first:
                hidden.append(states.cpu())
            self._arguments.setdefault(states.shape[:2], {})[layer.name] = (args, kwargs)
            return (states,) if layer.returns_tuple else states

        return forward

    def capture(self, layer: Layer, linear: str, observe: Observe) -> None:
        """Show `observe` every input of one linear of a filled layer; nothing after it is computed."""

        module = self._shell.model.get_submodule(linear)
        for states, mask in zip(self._hidden, self._masks, strict=True):
            handle = module.register_forward_pre_hook(partial(_observe_and_stop, observe, mask))
            try:
                self._run(layer, states)
            except _Reached:
                continue
            finally:
                handle.remove()

    def advance(self, layer: Layer) -> None:
        """Replace the hidden states by the filled layer's output."""
        for i, states in enumerate(self._hidden):  # one by one: old and new states never both stand in full
            self._hidden[i] = self._run(layer, states)

    @torch.no_grad()
    def _run(self, layer: Layer, states: Tensor) -> Tensor:
        args, kwargs = self._arguments[states.shape[:2]][layer.name]
        out = self._layers[layer.name](states.to(self._shell.device), *args, **kwargs)
        return (out[0] if layer.returns_tuple else out).cpu()

    def digest(self) -> str:
        """sha256 over the hidden states: equal streams, equal digests."""
        digest = hashlib.sha256()
        for states in self._hidden:
            digest.update(states.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def nbytes(self) -> int:
        return sum(states.nbytes for states in self._hidden)
