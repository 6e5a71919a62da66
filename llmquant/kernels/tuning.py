"""Tiles of the Triton kernels: what a device was measured to do best, or else a default that is only reasoned.

A table of measured tiles is a file for each device in the user's cache directory; `tune` writes it.
"""

import json
import os
import re
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from llmquant.checkpoint import durable
from llmquant.errors import RecipeError

FEW = 16  # tokens of the smallest tile, which has a way of its own to make numbers of codes
MOST_SPLITS, FEWEST_STEPS = 16, 2  # parts of one sum, and steps of each
WARPS = 8  # of a multiprocessor, that sums are split for: as many as have room by their registers


class Config(NamedTuple):
    """How one product is computed."""

    rows: int  # out features of a tile; divides triton.ROWS
    tokens: int  # of a tile; 16 or more, for the tensor cores
    split: int  # parts of each sum
    warps: int
    stages: int  # of the pipeline that loads


class Tile(NamedTuple):
    rows: int
    tokens: int
    warps: int
    stages: int


# For up to so many tokens: the best on an H100, with 8192 x 8192 and 4096 x 14336 and groups of 128, of those that fill
# registers without spilling whatever the groups. (For few tokens 64 rows are a tenth faster there, and spill with
# groups of 64.) Two warps multiply by mma.sync on Hopper, too, which for few tokens has less to wait for than wgmma.
DEFAULTS = {FEW: Tile(32, FEW, 2, 3), 32: Tile(64, 32, 4, 3), 1 << 62: Tile(64, 64, 4, 3)}

# For more tokens than so many, by the major compute capability, torch multiplies a dequantized weight. On Hopper
# because the kernel then takes longer than cuBLAS and what dequantizing adds to it, as measured on an H200; for others
# it is not measured yet.
MOST_TOKENS = {8: 256, 9: 64}
MOST_ELSEWHERE = 256

CANDIDATES = tuple(
    Config(rows, tokens, split, warps, stages)
    for rows, warps in ((32, 2), (64, 2), (64, 4), (128, 4), (128, 8))
    for tokens in (FEW, 32, 64)
    for split in (1, 2, 4, 8, 16)
    for stages in (3, 5)
)


@lru_cache(4096)
def choose(device: torch.device, m: int, n: int, tokens: int, step: int) -> Config:
    """For a weight [m, n] whose sums go `step` columns at a time."""
    measured = _table(_name(device)).get(key(m, n, tokens, step))
    return measured or default(m, n, tokens, step, _processors(device))


def default(m: int, n: int, tokens: int, step: int, processors: int) -> Config:
    """The first tile that the tokens fit; sums split as long as all parts run at the same time."""
    tile = next(tile for most, tile in DEFAULTS.items() if tokens <= most)
    programs, steps, split = -(-m // tile.rows) * -(-tokens // tile.tokens), -(-n // step), 1
    at_once = processors * WARPS // tile.warps
    while split < MOST_SPLITS and 2 * split * programs <= at_once and steps >= 2 * split * FEWEST_STEPS:
        split *= 2
    return Config(tile.rows, tile.tokens, split, tile.warps, tile.stages)


def candidates(tokens: int) -> list[Config]:
    """What `tune` is to try: no tile that is more than twice as wide as needed."""
    return [config for config in CANDIDATES if config.tokens < 2 * max(16, tokens)]


@cache
def most_tokens(device: torch.device) -> int:
    """For which a kernel of its own is to be faster than dequantizing."""
    if device.type != "cuda":
        return MOST_ELSEWHERE
    return MOST_TOKENS.get(torch.cuda.get_device_capability(device)[0], MOST_ELSEWHERE)


def key(m: int, n: int, tokens: int, step: int) -> str:
    """Of the table: tokens up to the next power of two, 16 or more, share an entry."""
    return f"{m}x{n}, steps of {step}, {max(16, 1 << (tokens - 1).bit_length())} tokens"


def tune(device: torch.device, key: str, seconds: Callable[[Config], float], tried: Iterable[Config]) -> Config:
    """Measure, keep the fastest for this device, and return it."""
    best = min(tried, key=seconds)
    path = _path(_name(device))
    table = {name: list(config) for name, config in _table(_name(device)).items()} | {key: list(best)}
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_file(path, [json.dumps(table, indent=1, sort_keys=True).encode()])
    forget()
    return best


def forget() -> None:
    """Read the table anew when it is needed."""
    _table.cache_clear()
    choose.cache_clear()


@cache
def _table(device: str) -> dict[str, Config]:
    path = _path(device)
    if not path.is_file():
        return {}
    try:
        table = {name: Config(*map(int, values)) for name, values in json.loads(path.read_bytes()).items()}
        if not set(table.values()) <= set(CANDIDATES):
            raise ValueError("a tile of unknown size")
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"{path}: is no table of tiles ({error}); delete it") from error
    return table


def _path(device: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "llmquant" / f"triton-{re.sub('[^a-z0-9]+', '-', device.lower())}.json"


@cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
