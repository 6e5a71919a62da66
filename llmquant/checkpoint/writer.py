"""Files of a checkpoint, each written atomically and hashed on the way: shards, JSON, side files.

The same tensors give the same bytes: one metadata key (with more, their order is not stable across writers),
no time stamps, sorted keys.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint import durable
from llmquant.checkpoint.shard import DTYPES, PIECE, Lazy, opened, read_pieces
from llmquant.errors import NumericsError, OutputError

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

TensorSource = Tensor | Lazy


def write_shard(path: Path, tensors: Mapping[str, TensorSource]) -> str:
    """Write `tensors` as one safetensors file; returns its sha256 in hex.

    Wide dtypes come first, otherwise the order of the mapping: the format allows no padding between tensors, and
    loaders that view the bytes in place need each tensor to start at a multiple of its element size.
    Raises NumericsError for a NaN or Inf and OutputError for the disk; the old file then stands.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header, size = _header(path, ordered)

    def chunks() -> Iterator[bytes | bytearray | memoryview]:
        yield header
        for name, source in ordered.items():
            yield from _pieces(path, name, source)

    return durable.write_file(path, chunks(), len(header) + size)


def deferred(dtype: torch.dtype, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Lazy:
    """A tensor that is made when it is written, and gone after that."""

    def read() -> Iterator[memoryview]:
        tensor = make()
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"promised {dtype} {shape}, made {tensor.dtype} {tuple(tensor.shape)}")
        yield from _slices(tensor)

    return Lazy(dtype, shape, read)


def write_json(path: Path, value: Any) -> str:
    """Write `value` as UTF-8 JSON with sorted keys, indent 2 and a final newline; returns its sha256 in hex."""
    data = json_bytes(value)
    return durable.write_file(path, [data], len(data))


def json_bytes(value: Any) -> bytes:
    """What `write_json` writes."""
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def copy_file(source: Path, target: Path) -> str:
    """Copy a file byte for byte; returns its sha256 in hex. CheckpointError if it can't be read."""
    with opened(source) as fd:
        size = os.fstat(fd).st_size
        return durable.write_file(target, read_pieces(fd, source, 0, size), size)


def _header(path: Path, tensors: Mapping[str, TensorSource]) -> tuple[bytes, int]:
    """Length field and JSON, padded with spaces to a multiple of 8; and the size of the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, source in tensors.items():
        if source.dtype not in DTYPE_NAMES:
            raise OutputError(f"{path}: {name}: safetensors cannot hold {source.dtype}; convert it first")
        end = position + _nbytes(source)
        header[name] = {
            "dtype": DTYPE_NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, position


def _nbytes(source: TensorSource) -> int:
    return math.prod(source.shape) * source.dtype.itemsize


def _pieces(path: Path, name: str, source: TensorSource) -> Iterator[bytes | bytearray | memoryview]:
    """The bytes of one tensor, each piece checked for NaN and Inf before it is passed on."""
    done = 0
    for piece in _slices(source) if isinstance(source, Tensor) else source.read():
        _check_finite(path, name, source, piece, done)
        done += len(piece)
        yield piece
    if done != _nbytes(source):
        raise OutputError(f"{path}: {name}: its source gave {done} bytes of {_nbytes(source)}; run again")


def _slices(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    for part in flat.split(PIECE):
        yield memoryview(part.numpy())


def _check_finite(path: Path, name: str, source: TensorSource, piece: Any, offset: int) -> None:
    dtype = source.dtype
    if not (dtype.is_floating_point or dtype.is_complex) or not len(piece):
        return
    values = torch.frombuffer(piece, dtype=dtype)
    finite = torch.isfinite(values.float() if dtype.itemsize == 1 else values)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        index = [int(i) for i in torch.unravel_index(torch.tensor(first + offset // dtype.itemsize), source.shape)]
        raise NumericsError(
            f"{path}: {name}: element {index} is {values[first].item()}; check this tensor in the source checkpoint"
        )
