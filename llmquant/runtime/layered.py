"""A checkpoint that need not fit into memory: all windows pass one layer, then the next one takes its place."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.calibration.batches import Batch
from llmquant.calibration.stream import Stream
from llmquant.checkpoint.reader import Checkpoint
from llmquant.model.layout import Layer, derive_layout
from llmquant.runtime.loader import Filling


class Layered:
    """The logits of a model of which one layer, or what is outside of all layers, is in memory at a time.

    They are those of the whole model, bit for bit: the same modules compute them. What lives on from layer to layer is
    one hidden state for each token of the windows, on the CPU.
    """

    def __init__(
        self,
        directory: str | Path,
        dtype: torch.dtype | None = None,
        at_once: int | None = None,
        noticed: Callable[[float], None] = lambda part: None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Let `at_once` windows pass together, all of them if not given; each time the checkpoint is read.

        `noticed` is told each part of the work that is done; the parts add up to 1.

        Raises CheckpointError if there is no checkpoint that can be read.
        """
        self.name = str(directory)
        self._source, self._dtype, self._at_once = Checkpoint.open(directory), dtype, at_once
        self._noticed, self._device = noticed, device

    def logits(self, windows: Sequence[Tensor]) -> Iterator[Tensor]:
        """The logits [T, vocab] of each window [T], in order.

        Raises what `loader.load` raises, and ArchitectureError if the decoder layers cannot be told.
        """
        step = self._at_once or len(windows)
        for start in range(0, len(windows), step):
            yield from self._pass(windows[start : start + step], len(windows))

    @torch.no_grad()
    def _pass(self, windows: Sequence[Tensor], of: int) -> Iterator[Tensor]:
        filling = Filling(self._source, self._dtype, device=self._device)
        layers = derive_layout(filling.model.config).layers
        stream = Stream(filling, layers, tuple(Batch(ids[None], torch.ones_like(ids[None]).bool()) for ids in windows))
        for layer in layers:
            with filling.filled(filling.part(layer.name)):
                for i in range(len(windows)):
                    stream.hidden[i] = stream.forward(layer, stream.module(layer), stream.hidden, stream.left, i)
                    self._noticed(1 / (of * len(layers)))
        inside = tuple(f"{layer.name}." for layer in layers)
        filling.fill(name for name in filling.names if not name.startswith(inside))
        filling.model.tie_weights()
        for states in (each.to(filling.device) for each in stream.hidden):
            for layer in layers:
                _return(states, layer, stream.module(layer))
            yield filling.model(input_ids=stream.ids_for(states), use_cache=False).logits[0]


def _return(states: Tensor, layer: Layer, module: nn.Module) -> None:
    """In the place of what a layer makes of its input, whatever that is."""

    def forward(*_: Any, **__: Any) -> Any:
        return layer.as_returned(states)

    module.forward = MethodType(forward, module)
