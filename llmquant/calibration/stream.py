"""The calibration activations on their way through the model, one layer after another."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmquant.calibration.batches import Batch
from llmquant.calibration.spool import Spool
from llmquant.model.layout import Layer


class Host(Protocol):
    """The model whose layers a stream passes; a `Shell` is one."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def device(self) -> torch.device: ...
    def part(self, prefix: str) -> list[str]: ...
    def filled(self, names: list[str]) -> AbstractContextManager[None]: ...


class Stream:
    """Hidden states before the next decoder layer, one tensor [B, T, hidden] per batch.

    Everything that a layer receives besides hidden states (positions, masks) depends on the batch's
    shape alone, because sequences are padded on the right and the models are causal. It is recorded
    once per shape, by running the model with every layer's forward replaced by a recorder.

    Attributes:
        hidden: the states as the quantized layers make them.
        original: the states as the original layers make them; None unless they are to be `compared`. With `spill`
            they are kept in a file in that directory.
        masks: bool [B, T], False where padded.
    """

    def __init__(
        self,
        shell: Host,
        layers: tuple[Layer, ...],
        batches: tuple[Batch, ...],
        *,
        compared: bool = False,
        spill: Path | None = None,
    ) -> None:
        self._shell = shell
        self._layers = {layer.name: shell.model.get_submodule(layer.name) for layer in layers}
        self.masks = [batch.mask.to(shell.device) for batch in batches]
        self._arguments: dict[torch.Size, dict[str, tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self.hidden = self._embed(layers, batches)
        self.original: list[Tensor] | Spool | None = None
        if compared:
            self.original = Spool(self.hidden, spill) if spill else list(self.hidden)

    @torch.no_grad()
    def _embed(self, layers: tuple[Layer, ...], batches: tuple[Batch, ...]) -> list[Tensor]:
        base = self._shell.model.base_model
        prefix = next(name for name, module in self._shell.model.named_modules() if module is base)
        inside = tuple(f"{layer.name}." for layer in layers)
        outside = [name for name in self._shell.part(prefix) if not name.startswith(inside)]
        hidden: list[Tensor] = []
        recorders = {layer.name: self._recorder(layer, hidden, first=layer is layers[0]) for layer in layers}
        with self.replaced(recorders), self._shell.filled(outside):
            for batch in batches:
                base(input_ids=batch.input_ids.to(self._shell.device), use_cache=False)
        return hidden

    @contextmanager
    def replaced(self, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
        """Other forward passes in the place of the layers' own, by layer, for the length of a `with` block."""
        for name, module in self._layers.items():
            module.forward = MethodType(forwards[name], module)
        try:
            yield
        finally:
            for module in self._layers.values():
                del module.forward

    def _recorder(self, layer: Layer, hidden: list[Tensor], *, first: bool) -> Callable[..., Any]:
        def forward(module: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if first:
                hidden.append(states.cpu())
            self._arguments.setdefault(states.shape[-3:-1], {})[layer.name] = (args, kwargs)
            return layer.as_returned(states)

        return forward

    def module(self, layer: Layer) -> nn.Module:
        return self._layers[layer.name]

    def forwards(self, layer: Layer, module: nn.Module, states: Sequence[Tensor]) -> list[Callable[[], Tensor]]:
        """For each batch, a call that passes its states through `module`, which is the layer or a twin of it."""
        return [partial(self.forward, layer, module, states, i) for i in range(len(states))]

    def forward(self, layer: Layer, module: Callable[..., Any], states: Sequence[Tensor], batch: int) -> Tensor:
        """One batch's states after the layer, [B, T, hidden]; gradients flow if they are on."""
        args, kwargs = self._arguments[states[batch].shape[-3:-1]][layer.name]
        out = module(states[batch].to(self._shell.device), *args, **kwargs)
        return (out[0] if layer.returned else out).cpu()

    def digest(self) -> str:
        """sha256 over the states: equal streams, equal digests."""
        digest = hashlib.sha256()
        for states in chain(self.hidden, self.original or ()):
            digest.update(states.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()
