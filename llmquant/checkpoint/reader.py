"""A Hugging Face checkpoint, opened with suspicion and read tensor by tensor.

`Checkpoint.open` settles everything that can be settled from names and headers: no work starts on a directory that
could fail later. After that only the bytes of a tensor that is asked for are read, and a file that changes
meanwhile is noticed rather than mixed in.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.block_scaled import MEANT, Scaled, block_size, find_scaled, unscaled
from llmquant.checkpoint.shard import Lazy, TensorInfo, opened, read_header, read_pieces, read_prefix, read_tensor
from llmquant.checkpoint.source import check_config, locate, member, read_small
from llmquant.checkpoint.stacked import Part, Turned, find_stacked
from llmquant.checkpoint.strict_json import parse_object
from llmquant.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# What travels with the weights, unchanged.
SIDE_FILES = (
    "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template*", "*processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open checkpoint. Tensors are listed shard by shard, in the order of their bytes.

    Weights in FP8 with scales for blocks are listed and read as the bf16 that they mean (`block_scaled`), and `config`
    says nothing of it. Experts that lie in one tensor are listed and read one by one (`stacked`).
    """

    root: Path
    commit: str | None  # of the Hub, None for a local directory
    trust_remote_code: bool
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    file_of: dict[str, str]
    files: tuple[str, ...]  # the shards
    _side: tuple[str, ...]
    _config_sha256: str
    _stamps: dict[str, tuple[int, int]]  # shard -> (size, mtime_ns) when its header was read
    _scaled: dict[str, Scaled]  # whose scales `tensors` does not list
    _turned: dict[str, Turned]

    @classmethod
    def open(cls, model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> "Checkpoint":
        """Open a directory, or a model on the Hub by name; CheckpointError unless all of it fits together."""
        root, commit = locate(model, revision, trust_remote_code)
        raw = read_small(_config_path(root))
        config = parse_object(raw, root / "config.json")
        check_config(root / "config.json", config, trust_remote_code)
        weight_map = _weight_map(root)
        files = tuple(sorted(set(weight_map.values()))) if weight_map else (SINGLE,)
        stamps = {file: _stamp(os.stat(member(root, file))) for file in files}
        headers = {file: read_header(root / file) for file in files}
        _check_index(root, weight_map, headers)
        tensors = {name: info for header in headers.values() for name, info in header.items()}
        scaled = find_scaled(tensors, block, str(root)) if (block := block_size(config)) else {}
        hidden = {each.name for each in scaled.values()}
        stacked = find_stacked(tensors, str(root))
        listed = {
            file: [part for name, info in header.items() for part in stacked.get(name, [Part(name, info)])]
            for file, header in headers.items()
        }
        if scaled:
            config = {key: value for key, value in config.items() if key != "quantization_config"}
        return cls(
            root,
            commit,
            trust_remote_code,
            config,
            tensors={
                name: info._replace(dtype=MEANT) if name in scaled else info
                for parts in listed.values()
                for name, info, _ in parts
                if name not in hidden
            },
            file_of={part.name: file for file, parts in listed.items() for part in parts},
            files=files,
            _side=_side_files(root, with_code=trust_remote_code and "auto_map" in config),
            _config_sha256=hashlib.sha256(raw).hexdigest(),
            _stamps=stamps,
            _scaled=scaled,
            _turned={part.name: part.turned for parts in listed.values() for part in parts if part.turned},
        )

    def read(self, name: str) -> Tensor:
        """The tensor `name` in memory of its own, on the CPU; CheckpointError if its shard changed since `open`."""
        info = self._info(name)
        if turned := self._turned.get(name):
            return turned.of(self._read(name, turned.matrix))
        if scaled := self._scaled.get(name):
            return unscaled(self._read(name, scaled.weight), self._read(scaled.name, scaled.scales), scaled.block)
        return self._read(name, info)

    def _read(self, name: str, info: TensorInfo) -> Tensor:
        with self._unchanged(self.file_of[name]) as (fd, path):
            return read_tensor(fd, path, info)

    def lazy(self, name: str) -> Lazy:
        """The tensor `name`, to be streamed in pieces of 16 MB; each `read` raises as `Checkpoint.read` does."""
        info = self._info(name)

        def pieces() -> Iterator[bytearray | memoryview]:
            if name in self._scaled or name in self._turned:
                yield self.read(name).flatten().view(torch.uint8).numpy().data
                return
            with self._unchanged(self.file_of[name]) as (fd, path):
                yield from read_pieces(fd, path, info.start, info.end)

        return Lazy(info.dtype, info.shape, pieces)

    def side_files(self) -> list[str]:
        """Names of the files that belong beside the weights: tokenizer, templates, generation config, licence."""
        return list(self._side)

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must find again: sha256 of config and side files; size, time and header of each shard."""
        side = {name: hashlib.sha256(read_small(member(self.root, name))).hexdigest() for name in self._side}
        files = {file: self._shard_fingerprint(file) for file in self.files}
        return {"config": self._config_sha256, "side": side, "files": files}

    def _shard_fingerprint(self, file: str) -> dict[str, Any]:
        size, mtime_ns = self._stamps[file]
        with self._unchanged(file) as (fd, path):
            header = hashlib.sha256(read_prefix(fd, path)).hexdigest()
        return {"size": size, "mtime_ns": mtime_ns, "header": header}

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.root}: {name}: there is no such tensor; is the checkpoint complete?")
        return self.tensors[name]

    @contextmanager
    def _unchanged(self, file: str) -> Iterator[tuple[int, Path]]:
        """The shard's descriptor and path; its size and time are compared before and after the reading."""
        path = self.root / file
        with opened(path) as fd:
            if _stamp(os.fstat(fd)) != self._stamps[file]:
                raise CheckpointError(f"{path}: changed since it was opened; put the original back and run again")
            yield fd, path
            if _stamp(os.fstat(fd)) != self._stamps[file]:
                raise CheckpointError(f"{path}: changed while it was read; put the original back and run again")


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _config_path(root: Path) -> Path:
    if not os.path.lexists(root / "config.json"):
        raise CheckpointError(f"{root}: has no config.json; give the directory of a transformers model")
    return member(root, "config.json")


def _weight_map(root: Path) -> dict[str, str] | None:
    """Tensor -> shard as the index has it; None for a model in a single file."""
    if not os.path.lexists(root / INDEX):
        if not os.path.lexists(root / SINGLE):
            raise CheckpointError(f"{root}: {_other_weights(root)}")
        return None
    path = member(root, INDEX)
    weight_map = parse_object(read_small(path), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: is missing or empty; download the model again")
    for tensor, file in weight_map.items():
        if not tensor.isprintable() or len(tensor) > 512:
            raise CheckpointError(f"{path}: {tensor[:40]!r}: is no tensor name; download the model again")
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: {tensor}: is in {str(file)[:80]!r}, not a .safetensors file; use a safetensors model"
            )
    for file in sorted(set(weight_map.values())):
        member(root, file)
    return weight_map


def _other_weights(root: Path) -> str:
    """Why there is nothing to read here, in the words of what is here instead."""
    for name in _listing(root):
        if name.endswith(WEIGHT_SUFFIXES[1:]):
            return f"has no safetensors weights, and {name} is in a format that is not read; convert the model first"
    return f"has neither {SINGLE} nor {INDEX}; download the model again"


def _listing(root: Path) -> list[str]:
    try:
        return sorted(os.listdir(root))
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be listed: {error.strerror}; check its permissions") from error


def _check_index(root: Path, weight_map: dict[str, str] | None, headers: dict[str, dict[str, TensorInfo]]) -> None:
    """Index and shards must say the same, both ways, and no shard may lie about unlisted."""
    if not any(headers.values()):
        raise CheckpointError(f"{root}: holds no tensors; download the model again")
    if weight_map is None:
        weight_map = dict.fromkeys(headers[SINGLE], SINGLE)
    for file, header in headers.items():
        for name in header:
            if name not in weight_map:
                raise CheckpointError(f"{root / file}: {name}: is not in {INDEX}; download the model again")
            if (home := weight_map[name]) != file:
                where = f"is also in {home}" if name in headers[home] else f"is in {home} according to {INDEX}"
                raise CheckpointError(f"{root / file}: {name}: {where}; download the model again")
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise CheckpointError(
                f"{root / file}: {name}: is missing, though {INDEX} lists it; download the model again"
            )
    for name in _listing(root):
        if fnmatch(name, "model*.safetensors") and name not in headers:
            raise CheckpointError(f"{root / name}: is not in {INDEX}; remove it or download the model again")


def _side_files(root: Path, with_code: bool) -> tuple[str, ...]:
    patterns = (*SIDE_FILES, "*.py") if with_code else SIDE_FILES
    return tuple(
        member(root, name).name
        for name in _listing(root)
        if any(fnmatch(name, pattern) for pattern in patterns)
        and not name.endswith(WEIGHT_SUFFIXES)
        and not (root / name).is_dir()
    )
