"""The small run that the fault tests break."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmquant.pipeline import quantize
from llmquant.recipe import Recipe

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the forks


@pytest.fixture(scope="session")
def model(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(layers=2, hidden=32, intermediate=64)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 512, (24,), generator=generator).tolist() for _ in range(3)]
    path = tmp_path_factory.mktemp("calibration") / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def recipe(model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = Recipe.from_dict(
        {"scheme": {"group_size": 32}, "calibration": {"source": str(calibration), "samples": 3, "seq_len": 24}}
    )
    # Once in this process, so that the forked ones find everything imported; on one thread, so that they can work.
    quantize(model, tmp_path_factory.mktemp("warm") / "out", recipe)
    return recipe
