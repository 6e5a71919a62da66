"""Weights in FP8 with a scale for each block, as DeepSeek-V3 and others are published, read as what they mean, in bf16.

    <name>            float8_e4m3fn [m, n]
    <name>_scale_inv  fp32 [ceil(m / bm), ceil(n / bn)]   what the numbers of a block are multiplied by

`weight_block_size` of config.json is [bm, bn]. (DeepSeek-V3, README_WEIGHTS.md:
https://github.com/deepseek-ai/DeepSeek-V3.)
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmquant.checkpoint.shard import TensorInfo
from llmquant.errors import CheckpointError

SUFFIX = "_scale_inv"
STORED, MEANT = torch.float8_e4m3fn, torch.bfloat16


class Scaled(NamedTuple):
    """A weight as it is stored, and its scales with their name."""

    weight: TensorInfo
    name: str
    scales: TensorInfo
    block: tuple[int, int]


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The blocks of a checkpoint that is published so; None of any other."""
    block = config.get("quantization_config")
    if not isinstance(block, dict) or block.get("quant_method") != "fp8" or block.get("fmt", "e4m3") != "e4m3":
        return None
    match block.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    return None


def find_scaled(tensors: Mapping[str, TensorInfo], block: tuple[int, int], where: str) -> dict[str, Scaled]:
    """The weights that have scales.

    Raises:
        CheckpointError: scales of another shape or kind.
    """
    found = {}
    for name, info in tensors.items():
        if info.dtype != STORED or (scales := tensors.get(f"{name}{SUFFIX}")) is None:
            continue
        wanted = tuple(-(-size // width) for size, width in zip(info.shape, block, strict=False))
        if len(info.shape) != 2 or scales.shape != wanted or scales.dtype not in (torch.float32, torch.bfloat16):
            raise CheckpointError(
                f"{where}: {name}{SUFFIX}: is {scales.dtype} {scales.shape}, but {name} {info.shape} in blocks of "
                f"{block} has fp32 {wanted}; fetch the checkpoint again"
            )
        found[name] = Scaled(info, f"{name}{SUFFIX}", scales, block)
    return found


def unscaled(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """What is meant, bf16 [m, n]; block by block, so that no second copy in fp32 is needed."""
    out = torch.empty(weight.shape, dtype=MEANT)
    rows, columns = block
    for i, row in enumerate(scales.float().repeat_interleave(columns, 1)[:, : weight.shape[1]]):
        part = slice(i * rows, (i + 1) * rows)
        out[part] = (weight[part].float() * row).to(MEANT)
    return out
