"""The calibration text once forwards through the original model and once backwards, one layer in memory at a time.

What comes back is the gradient of the model's own uncertainty: labels are drawn from what the model predicts, so that
the mean of products of these gradients is the Fisher information, the second derivative of the KL divergence between
the model and a slightly changed one (Kunstner et al., Limitations of the empirical Fisher approximation, 2019).
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmquant.calibration.batches import Batch
from llmquant.calibration.spool import Spool
from llmquant.calibration.stream import Stream, aside
from llmquant.errors import RecipeError
from llmquant.model.layout import Group, Layer
from llmquant.model.names import tied_names
from llmquant.model.shell import Shell, place


class Tap(NamedTuple):
    """Linears that share an input, while one batch goes back through their layer; tokens that count only."""

    group: Group
    x: Tensor  # their input, [k, n]
    gradient: Tensor | None  # of their outputs side by side, [k, m]: of the sum over tokens of -log p(drawn label)
    size: Tensor  # root mean square of each token's state before the layer, fp32 [k]


class RoundTrip:
    """Forwards at once, backwards by `backward`. The states before each layer are kept, with `spill` in files there.

    Only batches in `probed` get gradients; the others pass each layer a second time without.
    """

    def __init__(
        self,
        shell: Shell,
        layers: tuple[Layer, ...],
        batches: tuple[Batch, ...],
        probed: Collection[int],
        *,
        spill: Path | None = None,
    ) -> None:
        if any(layer.handed for layer in layers):  # by the way back, what a layer handed on is not there any more
            raise RecipeError("sensitivity: is not measured where layers hand on more than hidden states")
        self.shell, self.layers, self._probed = shell, layers, sorted(probed)
        self.stream = Stream(shell, layers, batches)
        self.states: list[list[Tensor] | Spool] = []
        states = self.stream.hidden
        for layer in layers:
            self.states.append(Spool(states, spill) if spill else states)
            with torch.no_grad(), shell.filled(shell.part(layer.name)):
                forwards = self.stream.forwards(layer, self.stream.module(layer), states, self.stream.left)
                states = [forward() for forward in forwards]
        self.last = states

    @property
    def tokens(self) -> int:
        """Those that count."""
        return sum(int(mask.sum()) for mask in self.stream.masks)

    def logits(self, states: Iterable[Tensor]) -> Iterator[Tensor]:
        """What the model says after each of `states`, those of whole batches behind the last layer: [B, T, vocab].

        Gradients flow to the states if they are on. What is outside of the layers is filled until the last is taken.
        """
        shell, given = self.shell, list[Tensor]()

        def handing_over(layer: Layer) -> Callable[..., Any]:
            return lambda *_, **__: layer.as_returned(given[0])

        inside = tuple(f"{layer.name}." for layer in self.layers)
        outside = [name for name in shell.names if not name.startswith(inside)]
        forwards = {layer.name: handing_over(layer) for layer in self.layers}
        with self.stream.replaced(forwards), shell.filled(outside), self._tied():
            for each in states:
                given[:] = [each.to(shell.device)]
                yield shell.model(input_ids=self.stream.ids_for(each), use_cache=False).logits

    @contextmanager
    def _tied(self) -> Iterator[None]:
        """The head that is the embedding, while the embedding is filled."""
        model = self.shell.model
        tied = tied_names(model)
        for name in tied:
            place(model, name, model.get_input_embeddings().get_parameter("weight").data)
        try:
            yield
        finally:
            for name in tied:
                place(model, name, model.get_parameter(name).data.to("meta"))

    def backward(self, visit: Callable[[Tap], None], seed: int) -> Iterator[Layer]:
        """From the last layer to the first: `visit` sees each group of linears once for each batch, then its layer is
        yielded, which stays filled until the next one is asked for."""
        gradients = self._at_the_end(torch.Generator(self.shell.device).manual_seed(seed))
        for number in reversed(range(len(self.layers))):
            layer = self.layers[number]
            with self.shell.filled(self.shell.part(layer.name)):
                for i, states in enumerate(self.states[number]):
                    back = self._back_through(layer, states, i, gradients.get(i), visit)
                    if back is not None:
                        gradients[i] = back
                yield layer

    def _at_the_end(self, generator: torch.Generator) -> dict[int, Tensor]:
        """The gradients of the states behind the last layer, by batch."""
        gradients = {}
        leaves = {i: self.last[i].detach().requires_grad_() for i in self._probed}
        with torch.enable_grad():
            for (i, leaf), logits in zip(leaves.items(), self.logits(leaves.values()), strict=True):
                mask = self.stream.masks[i]
                with torch.no_grad():
                    slope = logits.float().softmax(-1)
                    drawn = torch.multinomial(slope.flatten(0, 1), 1, generator=generator)
                    slope.scatter_add_(-1, drawn.view(*slope.shape[:2], 1), slope.new_full((*slope.shape[:2], 1), -1))
                    slope.mul_(mask.unsqueeze(-1))
                logits.backward(slope.to(logits.dtype))
                gradients[i] = _gradient(leaf)
        return gradients

    def _back_through(
        self, layer: Layer, states: Tensor, batch: int, gradient: Tensor | None, visit: Callable[[Tap], None]
    ) -> Tensor | None:
        """One batch through one layer: the gradient of its input from that of its output, if there is one."""
        mask = self.stream.masks[batch].reshape(-1)
        size = self.stream.sizes(states).reshape(-1).to(mask.device)
        leaf = states.detach().clone().requires_grad_(gradient is not None)
        with torch.set_grad_enabled(gradient is not None), self._noted(layer) as passed:
            out = self.stream.forward(layer, self.stream.module(layer), {batch: leaf}, aside(self.stream.left), batch)
            if gradient is not None:
                out.backward(gradient)

        def counted(part: Tensor) -> Tensor:
            return part.reshape(len(mask), -1)[mask]

        for group in layer.groups:
            slopes = None
            if gradient is not None:
                slopes = torch.cat([counted(_gradient(passed[name][1])) for name in group.linears], 1)
            visit(Tap(group, counted(passed[group.linears[0]][0]), slopes, size[mask]))
        return None if gradient is None else _gradient(leaf)

    @contextmanager
    def _noted(self, layer: Layer) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Input and output of each linear that is called in a `with` block; the output will know its gradient."""
        passed: dict[str, tuple[Tensor, Tensor]] = {}

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
                if out.requires_grad:
                    out.retain_grad()
                passed[name] = args[0].detach(), out

            return hook

        names = [name for group in layer.groups for name in group.linears]
        hooks = [self.shell.model.get_submodule(name).register_forward_hook(note(name)) for name in names]
        try:
            yield passed
        finally:
            for hook in hooks:
                hook.remove()


def _gradient(tensor: Tensor) -> Tensor:
    """What came back to a tensor; nothing where the loss does not depend on it."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
