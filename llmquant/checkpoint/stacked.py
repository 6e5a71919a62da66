"""Experts that lie in two tensors for a whole layer, as Qwen3.5 and others are published, listed one by one.

    <block>.experts.gate_up_proj  [experts, 2 inner, hidden]   the rows of gate, then those of up
    <block>.experts.down_proj     [experts, hidden, inner]

Qwen3-VL has each matrix transposed, [experts, hidden, 2 inner] and [experts, inner, hidden]: sizes tell which it is.
Granite's blocks, `block_sparse_moe`, have <block>.input_linear.weight and <block>.output_linear.weight instead.
(Layouts: transformers, `conversion_mapping.py`.)
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.checkpoint.shard import TensorInfo
from llmquant.errors import CheckpointError

GATE_UP, DOWN = ".experts.gate_up_proj", ".experts.down_proj"
PAIRS = ((GATE_UP, DOWN, ""), (".input_linear.weight", ".output_linear.weight", ".block_sparse_moe"))  # of such blocks
NUMBERS = (torch.bfloat16, torch.float16, torch.float32)
MOST = 4096  # experts of a layer; bounds the memory that a hostile header can ask for


class Turned(NamedTuple):
    """Rows of the transpose of a matrix that is stored."""

    matrix: TensorInfo
    first: int
    rows: int

    def of(self, matrix: Tensor) -> Tensor:
        return matrix.T[self.first : self.first + self.rows].contiguous()


class Part(NamedTuple):
    """A tensor as it is listed. Its bytes are where `info` says, unless it is `turned`."""

    name: str
    info: TensorInfo
    turned: Turned | None = None


def find_stacked(tensors: Mapping[str, TensorInfo], where: str) -> dict[str, list[Part]]:
    """By the name of a tensor that holds the experts of a layer: their matrices.

    Raises:
        CheckpointError: one of these is there by itself, too.
    """
    found: dict[str, list[Part]] = {}
    for name, gate_up in tensors.items():
        for first, second, owner in PAIRS:
            block = name.removesuffix(first)
            down = tensors.get(f"{block}{second}") if block != name and block.endswith(owner) else None
            if down is None or not {gate_up.dtype, down.dtype} <= {*NUMBERS}:
                continue
            if (turned := _is_turned(gate_up.shape, down.shape)) is not None:
                found[name] = list(_parts(block, ("gate_proj", "up_proj"), gate_up, turned=turned))
                found[f"{block}{second}"] = list(_parts(block, ("down_proj",), down, turned=turned))
    for name, parts in found.items():
        for part in parts:
            if part.name in tensors:
                raise CheckpointError(f"{where}: {part.name}: is also a part of {name}; fetch the checkpoint again")
    return found


def _is_turned(gate_up: tuple[int, ...], down: tuple[int, ...]) -> bool | None:
    """None if they are not matrices of the same experts."""
    match gate_up, down:
        case (count, a, b), (other, c, d) if count == other <= MOST and count * a * b * c * d:
            return False if (a, b) == (2 * d, c) else True if (a, b) == (d, 2 * c) else None
    return None


def _parts(block: str, kinds: tuple[str, ...], stack: TensorInfo, *, turned: bool) -> Iterator[Part]:
    count, *matrix = stack.shape
    m, n = reversed(matrix) if turned else matrix
    rows, size = m // len(kinds), stack.dtype.itemsize * math.prod(matrix)
    for expert in range(count):
        start = stack.start + expert * size
        for number, kind in enumerate(kinds):
            name, piece = f"{block}.experts.{expert}.{kind}.weight", size // len(kinds)
            info = TensorInfo(stack.dtype, (rows, n), start + number * piece, start + (number + 1) * piece)
            whole = TensorInfo(stack.dtype, tuple(matrix), start, start + size)
            yield Part(name, info, Turned(whole, number * rows, rows) if turned else None)
