"""Checkpoints that llmquant writes, for the programs that people load them with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agreement import Table, machine
from transformers.quantizers.auto import AutoHfQuantizer

from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.version import __version__

SMOLLM2 = Path(__file__).parents[2] / ".cache" / "smollm2-135m"


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What people have who never installed llmquant: without `runtime.transformers_hook`."""
    theirs = AutoHfQuantizer.merge_quantization_configs.__wrapped__
    monkeypatch.setattr(AutoHfQuantizer, "merge_quantization_configs", staticmethod(theirs))


@pytest.fixture(scope="session")
def quantized(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`quantized("llama", format="gptq", scheme={...})`: a small model by that recipe, round-to-nearest if not said."""
    made: dict[str, Path] = {}

    def make(arch: str = "llama", **recipe: Any) -> Path:
        key = f"{arch} {recipe}"
        if key not in made:
            source = make_checkpoint(arch=arch, hidden=128, intermediate=256)
            made[key] = tmp_path_factory.mktemp("quantized") / "model"
            quantize(source, made[key], Recipe.from_dict({"method": "rtn", **recipe}))
        return made[key]

    return make


@pytest.fixture(scope="session")
def quantized_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`quantized_smollm2("gptq")`: a trained model of 30 layers with tied embeddings, int4, in that format."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip(f"no model at {SMOLLM2.relative_to(SMOLLM2.parents[1])}; run make model")
    made: dict[tuple[str, bool, int], Path] = {}

    def make(layout: str, symmetric: bool = True, group_size: int = 64) -> Path:
        key = layout, symmetric, group_size
        if key not in made:
            made[key] = tmp_path_factory.mktemp("smollm2") / layout
            recipe = {"method": "rtn", "format": layout, "scheme": {"group_size": group_size, "symmetric": symmetric}}
            quantize(SMOLLM2, made[key], Recipe.from_dict(recipe))
        return made[key]

    return make


TABLE = pytest.StashKey[Table]()


@pytest.fixture(scope="session")
def table(pytestconfig: pytest.Config) -> Table:
    """Where a test puts what it has measured; printed at the end."""
    return pytestconfig.stash.setdefault(TABLE, Table())


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if rows := config.stash.get(TABLE, Table()).rows:
        terminalreporter.section(f"agreement with llmquant {__version__}, {machine()}")
        for row in rows:
            terminalreporter.write_line(row)
