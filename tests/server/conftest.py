"""A packed checkpoint, and servers of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

from serving import Server, serving

from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.scheme import Scheme


@pytest.fixture(scope="session")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "tiny-int4"
    quantize(tiny_checkpoint, out, Recipe(method="rtn", scheme=Scheme(4, 32)))
    return out


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """`with start(directory, "--max-queue", 1) as server:`."""
    return serving


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[Server]:
    with serving(packed, "--max-concurrency", 4, "--device", "cpu") as running:
        yield running
