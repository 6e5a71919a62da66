"""The calibration activations on their way through the model, one layer after another."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
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


# What layers leave for later ones beside their states, for each batch and by the argument that it is: what all of them
# fill, as keys and values that the last of Gemma 4 share, and what each hands to the next, as GLM-5 its tokens.
Left = dict[tuple[int, int | str], Any]
Arguments = dict[int | str, Any]  # by place or name


class Stream:
    """Hidden states before the next decoder layer, one tensor [B, T, hidden] per batch.

    A token may have several: [k, B, T, hidden] in Gemma 3n, [B, T, k, hidden] in DeepSeek-V4.

    Most of what a layer receives besides hidden states and what others left (positions, masks) depends on the
    batch's shape alone, because sequences are padded on the right and the models are causal. It is recorded
    once per shape, by running the model with every layer's forward replaced by a recorder; and for each batch
    where it differs, as what Gemma 4 adds to a layer by token.

    Attributes:
        hidden: the states as the quantized layers make them.
        left: what these leave for later ones.
        original: the states as the original layers make them; None unless they are to be `compared`. With `spill`
            they are kept in a file in that directory.
        original_left: what these leave.
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
        self._arguments: dict[tuple[torch.Size, str], Arguments] = {}
        self._own: dict[tuple[int, str], Arguments] = {}  # of a batch, where they differ
        self.hidden, self.left = self._embed(layers, batches), Left()
        self.original: list[Tensor] | Spool | None = None
        self.original_left = Left()
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
            given: Arguments = dict(chain(enumerate(args), kwargs.items()))
            batch = len(hidden) - 1
            usual = self._arguments.setdefault((self.masks[batch].shape, layer.name), given)
            self._own[batch, layer.name] = {n: v for n, v in given.items() if not _alike(v, usual.get(n))}
            return layer.as_returned(states)

        return forward

    def module(self, layer: Layer) -> nn.Module:
        return self._layers[layer.name]

    def forwards(
        self, layer: Layer, module: nn.Module, states: Sequence[Tensor], left: Left
    ) -> list[Callable[[], Tensor]]:
        """For each batch, a call that passes its states through `module`, which is the layer or a twin of it."""
        return [partial(self.forward, layer, module, states, left, i) for i in range(len(states))]

    def forward(
        self,
        layer: Layer,
        module: Callable[..., Any],
        states: Sequence[Tensor] | Mapping[int, Tensor],
        left: Left,
        batch: int,
    ) -> Tensor:
        """One batch's states after the layer, [B, T, hidden]; gradients flow if they are on.

        What those before it have left is in `left`, to which the layer adds.
        """
        given = self._arguments[self.masks[batch].shape, layer.name] | self._own[batch, layer.name]
        given |= {name: left.setdefault((batch, name), type(v)()) for name, v in given.items() if _to_be_filled(v)}
        given |= {name: left.get((batch, name)) for name, _ in layer.handed}
        args = [argument for place, argument in given.items() if isinstance(place, int)]
        kwargs = {name: argument for name, argument in given.items() if isinstance(name, str)}
        out = module(states[batch].to(self._shell.device), *args, **kwargs)
        left |= {(batch, name): out[place] for name, place in layer.handed}
        return (out[0] if layer.returned else out).cpu()

    def sizes(self, states: Tensor) -> Tensor:
        """Root mean square of each token's states, fp32 [B, T]."""
        squares = states.float().square()
        squares = squares.flatten(2) if self._before(states) else squares.movedim(0, -2).flatten(2)
        return squares.mean(-1).sqrt().clamp(min=1e-6)

    def ids_for(self, states: Tensor) -> Tensor:
        """Any token ids, int64 [B, T], as many as there are `states`."""
        shape = states.shape[:2] if self._before(states) else states.shape[1:3]
        return torch.zeros(shape, dtype=torch.int64, device=self._shell.device)

    def _before(self, states: Tensor) -> bool:
        """Whether a token's place comes before that of its states."""
        return states.dim() == 3 or self.hidden[0].shape[:2] == self.masks[0].shape

    def digest(self) -> str:
        """sha256 over the states: equal streams, equal digests."""
        digest = hashlib.sha256()
        for states in chain(self.hidden, self.original or ()):
            digest.update(states.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _to_be_filled(argument: Any) -> bool:
    """No layer has run while arguments were recorded: what layers fill was empty."""
    return isinstance(argument, MutableMapping) and not argument


def _alike(one: Any, other: Any) -> bool:
    """Whether two arguments are the same numbers, in the same structure."""
    (leaves, tree), (others, other_tree) = tree_flatten(one), tree_flatten(other)
    return tree == other_tree and all(map(_equal, leaves, others))


def _equal(one: Any, other: Any) -> bool:
    tensors = isinstance(one, Tensor) and isinstance(other, Tensor)
    return one is other or (torch.equal(one, other) if tensors else type(one) is type(other) and bool(one == other))


def aside(left: Left) -> Left:
    """The same, for a trial: what is added there is not seen here."""
    return {key: copy.copy(each) for key, each in left.items()}
