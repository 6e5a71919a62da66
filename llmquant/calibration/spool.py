"""States in a file instead of in memory, where there are many of them."""

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from llmquant.checkpoint.durable import reported


class Spool(Sequence[Tensor]):
    """A list of tensors whose bytes are in a file that has no name: it is gone with the process, however that ends.

    The tensors are views of the mapped file, which the system pages in and out as there is room. An assignment copies
    into it. The file is written in full at the start, so that a full disk shows there, as an error, and not later as a
    signal.
    """

    def __init__(self, states: Sequence[Tensor], directory: Path) -> None:
        """Raises OutputError if `directory` cannot hold all of `states`."""
        sizes = [state.nbytes for state in states]
        with reported(directory, sum(sizes)), tempfile.TemporaryFile(dir=directory) as file:
            for state in states:
                file.write(state.contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
            mapped = mmap.mmap(file.fileno(), sum(sizes))
        self._states = [
            torch.frombuffer(mapped, dtype=state.dtype, count=state.numel(), offset=end - state.nbytes).view(
                state.shape
            )
            for state, end in zip(states, accumulate(sizes), strict=True)
        ]

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return self._states[index]

    def __setitem__(self, index: int, state: Tensor) -> None:
        self._states[index].copy_(state)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)
