"""A recipe on random token ids, and what a model says of itself by it."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmquant.recipe import Recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """`recipe(target={"bits": 5})`, groups of 32 and 10 sequences of 48 tokens if not said otherwise."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("calibration") / "ids.jsonl"
    rows = [torch.randint(3, 512, (48,), generator=generator).tolist() for _ in range(10)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))

    def make(**options: Any) -> Recipe:
        calibration = {"source": str(path), "samples": 10, "seq_len": 48}
        values = {"method": "gptq", "scheme": {"group_size": 32}, "calibration": calibration}
        return Recipe.from_dict(values | options)

    return make
