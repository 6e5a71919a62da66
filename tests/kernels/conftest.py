"""The emulated CUDA library."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import SOURCES, Emulator, build_once

from llmquant import native
from llmquant.kernels import cuda


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    sources = [*sorted(SOURCES.glob("*.cu")), SOURCES / "emulated.cpp"]
    options = "-std=c++17 -O1 -Wall -Wextra -Werror -Wno-unknown-pragmas -shared -fPIC -x c++".split()
    return Emulator(build_once(tmp_path_factory, "llmquant_cuda_emulated.so", [*options, *sources]))


@pytest.fixture
def emulated_library(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[native.CudaLibrary]:
    """`kernels.cuda` with the emulated device in the place of a GPU: memory is the CPU's, and there is one stream."""
    emulator.emulate()
    monkeypatch.setattr(native, "CUDA_LIBRARY", Path(emulator.functions._name))
    opened = native.CudaLibrary()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda, "_library", lambda: opened)
    known = cuda.shapes, cuda._needs
    for cached in known:
        cached.cache_clear()
    yield opened
    for cached in known:
        cached.cache_clear()
