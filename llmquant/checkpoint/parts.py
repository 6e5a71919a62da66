"""A shard of our own, read back: for resume, for merging and for verification."""

import hashlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from llmquant.checkpoint.shard import Lazy, opened, read_header, read_pieces, read_tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a shard, in memory of their own, in file order."""
    with opened(path) as fd:
        return {name: read_tensor(fd, path, info) for name, info in read_header(path).items()}


def lazy_tensors(path: Path) -> dict[str, Lazy]:
    """All tensors of a shard, to be streamed, in file order."""
    return {
        name: Lazy(info.dtype, info.shape, partial(_pieces, path, info.start, info.end))
        for name, info in read_header(path).items()
    }


def _pieces(path: Path, start: int, end: int) -> Iterator[bytearray]:
    with opened(path) as fd:
        yield from read_pieces(fd, path, start, end)


def file_sha256(path: Path) -> str:
    """sha256 of a whole file, in hex."""
    digest = hashlib.sha256()
    with opened(path) as fd:
        for piece in read_pieces(fd, path, 0, os.fstat(fd).st_size):
            digest.update(piece)
    return digest.hexdigest()
