"""All calibration batches on their way through one layer, in lockstep.

A solver wants the input of a linear as the quantized linears before it make it, for every batch, before the linear is
quantized in its turn. So each batch passes the layer as a coroutine that stands still where a linear is about to be
called: the whole layer is computed once, and what waits is one input per batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn


def _stand_still(_: nn.Module, args: tuple[Any, ...]) -> None:
    if (caller := greenlet.getcurrent().parent) is not None:  # a call from outside of the walk goes on
        caller.switch(args[0])


class Walk:
    """Coroutines through `module`, each started by one of `forwards`, that stop before the linears `stops`."""

    def __init__(self, module: nn.Module, stops: tuple[str, ...], forwards: list[Callable[[], Tensor]]) -> None:
        self._forwards = forwards
        self._stops = stops
        self._visited = 0
        self._hooks = [module.get_submodule(stop).register_forward_pre_hook(_stand_still) for stop in stops]
        self._walkers = self._start()

    def close(self) -> None:
        self._walkers = []  # one that is dropped on its way unwinds
        for hook in self._hooks:
            hook.remove()

    @property
    def past(self) -> bool:
        """Whether the last stop was visited."""
        return self._visited == len(self._stops)

    def _start(self) -> list[greenlet]:
        return [greenlet(forward) for forward in self._forwards]

    @torch.no_grad()
    def inputs(self, stop: str) -> Iterator[Tensor]:
        """Bring every batch to the linear `stop`, one after the other: its input there, [..., n].

        The stops have to be visited in the order of the forward pass, and each to its end.
        """
        if self.past or self._stops[self._visited] != stop:
            raise ValueError(f"{stop} is not the next stop")
        self._visited += 1
        for walker in self._walkers:
            yield walker.switch()

    @torch.no_grad()
    def again(self) -> None:
        """Bring every batch to where it stands from the start of the layer anew: weights behind it have changed."""
        self._walkers = self._start()
        for walker in self._walkers:
            for _ in range(self._visited):
                walker.switch()

    @torch.no_grad()
    def outputs(self) -> Iterator[Tensor]:
        """Bring every batch to the end: what the layer makes of it."""
        if self._visited < len(self._stops):
            raise ValueError(f"{self._stops[self._visited]} was not visited")
        for walker in self._walkers:
            yield walker.switch()
