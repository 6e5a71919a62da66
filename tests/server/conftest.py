"""A packed checkpoint, and servers of it: real processes at ports of this machine."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")
pytest.importorskip("httpx")

import httpx

from llmquant.pipeline import quantize
from llmquant.recipe import Recipe
from llmquant.scheme import Scheme

KEY = "a key"
ADDRESS = re.compile(r" at (http://\S+)/v1, kernel: ")


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    name: str

    def client(self, **options: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.Client(**{"base_url": self.url, "headers": headers, "timeout": 60} | options)

    def metric(self, name: str) -> float:
        with self.client() as client:
            page = client.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^llmquant:{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))


@pytest.fixture(scope="session")
def packed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "tiny-int4"
    quantize(tiny_checkpoint, out, Recipe(method="rtn", scheme=Scheme(4, 32)))
    return out


@contextmanager
def serving(directory: Path, *options: object) -> Iterator[Server]:
    command = [sys.executable, "-m", "llmquant.cli", "serve", str(directory), "--port", "0", *map(str, options)]
    environment = os.environ | {"LLMQUANT_API_KEY": KEY}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stderr.readline()
        found = ADDRESS.search(line)
        assert found, line + process.stderr.read()
        yield Server(process, found[1], directory.name)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    """`with start(directory, "--max-queue", 1) as server:`."""
    return serving


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[Server]:
    with serving(packed, "--max-concurrency", 4, "--device", "cpu") as running:
        yield running
