"""One layer while all batches pass through it and its linears are replaced one after the other."""

import copy
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, repeat
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmquant.calibration.stream import Stream
from llmquant.calibration.walk import Walk
from llmquant.model.experts import routed, without_guests
from llmquant.model.layout import Layer


class Sample(NamedTuple):
    """A linear's input in one batch: all its tokens, [B, T, n] or [B * T, n], or those that an expert receives.

    Attributes:
        x: as the layers quantized so far make it.
        mask: bool, as many as there are tokens in x, False where padded.
        size: root mean square of each token's state before the layer, as many.
        original: x as the original layers make it; None where it is not compared.
        guests: so many of the last tokens were not sent to the expert.
    """

    x: Tensor
    mask: Tensor
    size: Tensor
    original: Tensor | None
    guests: int = 0


class Crossing:
    """A filled layer, from its first linear to its last; the stream is advanced at the end.

    The original states, where the stream has them, pass a twin of the layer that keeps the weights of the moment when
    the crossing began.

    Attributes:
        twin: the layer as it was; None without original states.
    """

    def __init__(
        self, stream: Stream, layer: Layer, stops: tuple[str, ...] = (), compared: tuple[str, ...] = ()
    ) -> None:
        """Stop before the linears `stops`, in the order of the forward pass; the twin only before those `compared`."""
        self.stream, self.layer = stream, layer
        self._compared = compared if stream.original is not None else ()
        module = stream.module(layer)
        self.twin = None if stream.original is None else _twin(module)
        self._originals = None
        if self.twin is not None and stream.original is not None:
            forwards = stream.forwards(layer, self.twin, stream.original, stream.original_left)
            self._originals = Walk(self.twin, self._local(compared), forwards)
        self._walk = Walk(module, self._local(stops), stream.forwards(layer, module, stream.hidden, stream.left))

    def __enter__(self) -> "Crossing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._walk.close()
        if self._originals:
            self._originals.close()

    def compares(self, linear: str) -> bool:
        return linear in self._compared

    def samples(self, linear: str) -> Iterator[Sample]:
        """The inputs of one linear, batch by batch, each linear in its turn."""
        (stop,) = self._local((linear,))
        originals: Iterator[Tensor | None] = repeat(None)
        if self.compares(linear) and self._originals:
            originals = self._originals.inputs(stop)
        elif self._originals and self._originals.past:
            self.targets()  # and the twin is no longer needed: what is replaced from here on need not be kept twice
        for x, mask, size in zip(self._walk.inputs(stop), self.stream.masks, self._sizes, strict=True):
            if (route := routed(x)) is None:
                yield Sample(x, mask, size, next(originals))
            else:
                tokens, guests = route.tokens, len(x) - route.chosen
                yield Sample(x, mask.flatten()[tokens], size.flatten()[tokens.cpu()], None, guests)

    @cached_property
    def _sizes(self) -> list[Tensor]:
        """Of each token's state before the layer, [B, T] for each batch."""
        return [self.stream.sizes(states) for states in self.stream.hidden]

    def again(self) -> None:
        """What the batches have passed already has changed: bring them anew to where they stand."""
        self._walk.again()

    def targets(self) -> Sequence[Tensor]:
        """The original states after the layer; the stream takes them over."""
        if self.stream.original is None:
            raise ValueError("the stream has no original states")
        if self._originals:
            for i, out in enumerate(self._originals.outputs()):  # one by one: old and new never both stand in full
                self.stream.original[i] = out
            self._originals.close()
            self._originals = self.twin = None
        return self.stream.original

    def advance(self) -> None:
        """Leave the layer: the stream's states are those after it."""
        if self._originals:
            self.targets()
        for i, out in enumerate(self._walk.outputs()):
            self.stream.hidden[i] = out

    def _local(self, linears: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.removeprefix(f"{self.layer.name}.") for name in linears)


def _twin(module: nn.Module) -> nn.Module:
    """Other modules with the same tensors: what is put in the place of a parameter there does not change it here."""
    shared: dict[int, torch.Tensor] = {id(t): t for t in chain(module.parameters(), module.buffers())}
    twin = copy.deepcopy(module, shared)
    without_guests(twin)
    return twin
