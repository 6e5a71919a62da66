"""From one packed layout of checkpoints to another: the same integers, scales and zero points in other places."""

from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmquant.checkpoint.writer import TensorSource, deferred, write_shard
from llmquant.convert.product import Files, Product, json_file, side_files
from llmquant.convert.source import Source
from llmquant.errors import CheckpointError, RecipeError
from llmquant.finish import INDEX, SINGLE
from llmquant.formats import FORMATS, Format
from llmquant.formats.checks import check_in_place
from llmquant.formats.gptq import Gptq
from llmquant.plan import Spec, shards_of, spec_bytes
from llmquant.scheme import Quantized, Scheme


class Packing(Protocol):
    """Of a layout, what writing its tensors takes; see `formats.Format`."""

    def specs(self, prefix: str, m: int, n: int, scheme: Scheme, dtype: torch.dtype) -> dict[str, Spec]: ...

    def pack(
        self, prefix: str, q: Quantized, scheme: Scheme, dtype: torch.dtype, order: Tensor | None = None
    ) -> dict[str, Tensor]: ...


def product(source: Source, to: str) -> Product:
    """A checkpoint in the layout `to`; config.json is its last file.

    Raises:
        RecipeError: the layout cannot hold what the source holds: bits, group size, several schemes, act-order.
    """
    target = FORMATS[to]
    if not source.schemes:
        raise CheckpointError(f"{source.checkpoint.root}: is not quantized; run llmquant quantize first")
    reordered = _check(source, target)
    skipped = [name for name in source.linears if name not in source.schemes]
    unpacked = [name for name in source.routers if name not in source.linears]  # which servers make linears of
    skipped += [source.stored(f"{name}.weight").removesuffix(".weight") for name in unpacked]
    block = target.config_block(source.schemes, skipped)
    if reordered:
        block["desc_act"] = True
    config = source.checkpoint.config | {"quantization_config": block}
    files = tensor_files(source, target)
    files |= side_files(source)
    if isinstance(target, Gptq):  # where older loaders look
        files["quantize_config.json"] = json_file(block)
    files["config.json"] = json_file(config)
    return Product(files, tuple(target.caveats(set(source.schemes.values()))))


def tensor_files(source: Source, target: Packing) -> Files:
    """The weights in shards, and their index if there are several. Tensors are packed as they are written."""
    dtype = source.scale_dtype()

    @lru_cache(maxsize=1)  # the tensors of a linear are mostly neighbours
    def packed(prefix: str) -> dict[str, Tensor]:
        name = source.prefixes[prefix]
        return target.pack(prefix, source.read(name), source.schemes[name], dtype, source.order(name))

    def tensor(name: str) -> TensorSource:
        if name in source.checkpoint.tensors and name in kept:
            return source.checkpoint.lazy(name)
        return deferred(*specs[name], lambda: packed(name.rpartition(".")[0])[name])

    kept = dict.fromkeys(source.kept())
    specs: dict[str, Spec] = {}
    for name in kept:
        info = source.checkpoint.tensors[name]
        specs[name] = info.dtype, info.shape
    for prefix, name in source.prefixes.items():
        specs |= target.specs(prefix, *source.linears[name], source.schemes[name], dtype)

    def shard_file(names: Iterable[str], path: Path) -> str:
        return write_shard(path, {name: tensor(name) for name in names})

    shards = shards_of(specs)
    if len(shards) == 1:
        return {SINGLE: partial(shard_file, specs)}
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files: Files = {file: partial(shard_file, shard) for file, shard in zip(names, shards, strict=True)}
    index = {
        "metadata": {"total_size": sum(map(spec_bytes, specs.values()))},
        "weight_map": {name: file for file, shard in zip(names, shards, strict=True) for name in shard},
    }
    return files | {INDEX: json_file(index)}


def _check(source: Source, target: Format) -> bool:
    """Refuse what the target cannot hold, before anything is written. Whether columns are reordered."""
    reordered = False
    for name, scheme in source.schemes.items():
        if reason := target.refuse(*source.linears[name], scheme):
            raise RecipeError(f"{name}: {target.NAME} cannot hold it: {reason}")
        if (order := source.order(name)) is not None:
            reordered = True
            if not isinstance(target, Gptq):
                check_in_place(name, order, target.NAME)
    return reordered
