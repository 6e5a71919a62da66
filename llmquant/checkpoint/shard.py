"""The safetensors file format, read with suspicion.

    8 bytes   N, length of the header, little-endian
    N bytes   {"name": {"dtype": "BF16", "shape": [m, n], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
    the rest  the tensors, without gap or overlap, to the last byte of the file

(format: https://huggingface.co/docs/safetensors). Our own parser, because a quantizer that trusts declared sizes
reads past the end and packs what it finds there into the model it publishes (the class of CVE-2026-7482), because
files are hashed and streamed while they are written, and because messages must name the file.
"""

import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.checkpoint.strict_json import parse_object
from llmquant.errors import CheckpointError

HEADER_LIMIT = 64 * 2**20  # bytes; the largest published headers are below 4 MB
TENSOR_LIMIT = 250_000  # per file; bounds the memory that a hostile header can ask for

PIECE = 16 * 2**20  # bytes held at a time when a tensor or file is streamed

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

# First bytes of what people find in place of a shard, what it is, and the way out.
IMPOSTORS = (
    (b"version https://git-lfs", "is a git-LFS pointer, not the weights; run `git lfs pull`"),
    (b"<!doctype", "is an HTML page, not the weights; download it again, logged in where the model asks for it"),
    (b"<html", "is an HTML page, not the weights; download it again, logged in where the model asks for it"),
    (b"pk\x03\x04", "is a PyTorch or zip archive, not safetensors; convert the model to safetensors first"),
    (b"\x80\x02", "is a Python pickle, which is never opened; convert the model to safetensors first"),
    (b"gguf", "is a GGUF file; take the original safetensors checkpoint of the model"),
)


class TensorInfo(NamedTuple):
    """Where one tensor lies: `start` and `end` are byte offsets from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Lazy:
    """A tensor that is not in memory; `read` gives its bytes in writable pieces, each of whole elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Iterable[bytearray | memoryview]]


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of the regular file `path`; an OSError inside the block becomes a CheckpointError that names it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # without NONBLOCK a FIFO would hang us
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CheckpointError(f"{path}: is not a regular file; a checkpoint holds plain files only")
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_exact(fd: int, path: Path, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` from byte `offset`. pread, not mmap: a file cut short under a mapping kills by SIGBUS."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise _unreadable(path, error) from error
        if count == 0:
            raise CheckpointError(f"{path}: ends at byte {offset + done}, shorter than when opened; download it again")
        done += count


def read_tensor(fd: int, path: Path, info: TensorInfo) -> Tensor:
    """One tensor on the CPU, in memory of its own."""
    if not info.nbytes:
        return torch.empty(info.shape, dtype=info.dtype)
    data = torch.empty(info.nbytes, dtype=torch.uint8)
    read_exact(fd, path, info.start, data.numpy().data)
    return data.view(info.dtype).reshape(info.shape)


def read_pieces(fd: int, path: Path, start: int, end: int) -> Iterator[bytearray]:
    """The bytes from `start` to `end`, in fresh buffers of at most 16 MB."""
    for offset in range(start, end, PIECE):
        piece = bytearray(min(PIECE, end - offset))
        read_exact(fd, path, offset, memoryview(piece))
        yield piece


def read_prefix(fd: int, path: Path) -> bytes:
    """The length field and the header, unparsed; the tensors begin where it ends."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, 32, 0)
    for magic, story in IMPOSTORS:
        if head.lower().startswith(magic):
            raise CheckpointError(f"{path}: {story}")
    if len(head) < 8:
        what = f"has only {size} bytes" if size else "is empty"
        raise CheckpointError(f"{path}: {what}, as an interrupted download leaves it; download it again")
    length = int.from_bytes(head[:8], "little")
    if length > HEADER_LIMIT:
        raise _broken(path, f"claims a header of {length} bytes (limit {HEADER_LIMIT}), so it is no model weights")
    if 8 + length > size:
        raise _broken(path, f"claims a header of {length} bytes but has only {size}, so it was cut short")
    prefix = bytearray(8 + length)
    read_exact(fd, path, 0, memoryview(prefix))
    return bytes(prefix)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of the file, in the order of its data; CheckpointError unless the file is whole and unambiguous."""
    with opened(path) as fd:
        prefix = read_prefix(fd, path)
        size = os.fstat(fd).st_size
    if prefix[8:9] != b"{":
        raise _broken(path, "has a header that is not a JSON object")
    if prefix.count(b"{") > TENSOR_LIMIT + 2:
        raise _broken(path, f"has a header with more than {TENSOR_LIMIT} tensors")
    header = parse_object(prefix[8:], path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "has a __metadata__ that is not a map of texts")
    infos = [(_tensor_info(path, name, entry, len(prefix)), name) for name, entry in header.items()]
    infos.sort(key=lambda item: (item[0].start, item[0].end))
    _check_tiling(path, infos, len(prefix), size)
    return {name: info for info, name in infos}


def _tensor_info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    if not name.isprintable() or len(name) > 512:
        raise _broken(path, f"has a tensor name that is no printable text of at most 512 characters: {name[:40]!r}")
    where = f"{path}: {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(where, "is not described by exactly dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise CheckpointError(f"{where}: has the dtype {str(kind)[:20]!r}, which is not supported; convert it to BF16")
    if not _sizes(shape) or len(shape) > 16 or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise _broken(where, "has a shape that no tensor can have")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(where, "has data_offsets that are no byte range")
    begin, end = offsets
    need = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != need:
        raise _broken(where, f"needs {need} bytes for {kind} {shape}, but its data_offsets hold {end - begin}")
    return TensorInfo(DTYPES[kind], tuple(shape), base + begin, base + end)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_tiling(path: Path, infos: list[tuple[TensorInfo, str]], base: int, size: int) -> None:
    """Tensors must cover the data exactly: an overlap or a gap is a second file hidden in the first."""
    position = base
    for info, name in infos:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a gap before it"
            raise _broken(f"{path}: {name}", f"{what} (starts at byte {info.start}, expected {position})")
        position = info.end
    if position != size:
        what = "was cut short" if position > size else "has trailing bytes"
        raise _broken(path, f"{what}: the header describes {position} bytes, the file has {size}")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}; check the path and the disk")


def _broken(where: Path | str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what}; download the file again")
