"""The small run that the fault tests break."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import write_ids

from llmquant.pipeline import quantize
from llmquant.recipe import Recipe

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the forks


@pytest.fixture(scope="session")
def model(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(layers=2, hidden=32, intermediate=64)


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ids(tmp_path_factory.mktemp("calibration") / "ids.jsonl", 3, 24)


@pytest.fixture(scope="session")
def recipe(model: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = Recipe.from_dict(
        {"scheme": {"group_size": 32}, "calibration": {"source": str(calibration), "samples": 3, "seq_len": 24}}
    )
    # Once in this process, so that the forked ones find everything imported; on one thread, so that they can work.
    quantize(model, tmp_path_factory.mktemp("warm") / "out", recipe)
    return recipe
