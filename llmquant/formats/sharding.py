"""How packed tensors are cut for tensor parallelism, and where they cannot be.

A rank of a server gets some of the rows of each linear (q, k, v, gate, up) or some of its columns (o, down). A cut must
not go through a group of columns, nor through a word of 32 bits.
"""

from collections.abc import Iterable
from math import gcd
from typing import NamedTuple

import torch

from llmquant.formats import Format
from llmquant.scheme import Scheme

BOOKKEEPING = (".weight_shape", ".g_idx")  # what follows from the shape and the scheme, and is not cut


class Axes(NamedTuple):
    """Along which axis of a packed tensor rows and columns of the weight run, and which of the two is packed."""

    rows: int
    columns: int | None  # None where one value serves a whole row
    packed: int | None


def axes(layout: Format, scheme: Scheme) -> dict[str, Axes]:
    """The axes of each tensor, read off the shapes that the layout gives to weights of three sizes."""
    size = 256
    once, tall, wide = (
        layout.specs("", m, n, scheme, torch.float32) for m, n in ((size, size), (2 * size, size), (size, 2 * size))
    )
    found = {}
    for name, (dtype, shape) in once.items():
        if name not in BOOKKEEPING:
            rows = next(axis for axis in range(2) if tall[name][1][axis] != shape[axis])
            columns = next((axis for axis in range(2) if wide[name][1][axis] != shape[axis]), None)
            packed = rows if shape[rows] != size else columns
            found[name] = Axes(rows, columns, None if dtype.is_floating_point else packed)
    return found


def refuse_cut(layout: Format, scheme: Scheme, rows: Iterable[int], columns: int, whole: int) -> str | None:
    """Why a rank cannot hold so many rows of each linear, or `columns` of the `whole`; None if it can."""
    per_word = 32 // gcd(32, scheme.bits)
    if columns != whole and scheme.group_size > 0 and columns % scheme.group_size:
        return f"{columns} columns on each rank are no multiple of the group size {scheme.group_size}"
    for name, along in axes(layout, scheme).items():
        short = [m for m in rows if m % per_word] if along.packed == along.rows else []
        if short:
            return f"{short[0]} rows on each rank end inside a word of {name.removeprefix('.')}"
        if along.packed == along.columns is not None and columns != whole and columns % per_word:
            return f"{columns} columns on each rank end inside a word of {name.removeprefix('.')}"
    return None
