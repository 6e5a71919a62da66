"""Small runs: their calibration text, their recipe, and who watches them; for the tests of several rooms."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmquant.manifest import MANIFEST, manifest_bytes, read_manifest
from llmquant.observer import Silent
from llmquant.pipeline import quantize
from llmquant.plan import Unit
from llmquant.recipe import Recipe


def write_ids(path: Path, rows: int, length: int) -> Path:
    """A calibration file of random sequences."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 512, (length,), generator=generator).tolist() for _ in range(rows)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return path


def recipe(calibration: Path, **options: Any) -> Recipe:
    """For a file of 12 sequences of 48 tokens."""
    values = {"scheme": {"group_size": 32}, "calibration": {"source": str(calibration), "samples": 12, "seq_len": 48}}
    return Recipe.from_dict(values | options)


def packer(
    original: Callable[[str], Path], directories: pytest.TempPathFactory, **options: Any
) -> Callable[[str], Path]:
    """`packed("llama")`: the checkpoint of a family by that recipe, made once."""
    made: dict[str, Path] = {}
    told = recipe(write_ids(directories.mktemp("calibration") / "ids.jsonl", 12, 48), **options)

    def packed(arch: str) -> Path:
        if arch not in made:
            made[arch] = directories.mktemp(arch) / "packed"
            quantize(original(arch), made[arch], told)
        return made[arch]

    return packed


def relist(directory: Path) -> None:
    """A manifest that fits whatever stands there now: only a look at the content can still find something."""
    names = [name for name in read_manifest(directory) if (directory / name).is_file()]
    digests = {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}
    (directory / MANIFEST).write_bytes(manifest_bytes(digests))


class Records(Silent):
    """Keeps what is solved."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def solved(self, record: dict[str, Any]) -> None:
        self.records.append(record)


class StopAfter(Silent):
    """Stops the run from inside, as a kill would from outside."""

    def __init__(self, units: int) -> None:
        self.left = units

    def finished(self, unit: Unit) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
