"""Which backend computes on the CPU, and what is said about it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmquant import native
from llmquant.errors import RecipeError


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Let a test choose a backend, and the next one choose again."""
    native.find_library.cache_clear()
    yield
    native.find_library.cache_clear()


def test_the_native_library_is_taken_where_it_is(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    assert native.active_backend() == ("native" if native.LIBRARY.is_file() else "reference")
    assert native.describe_backend().startswith(f"{native.active_backend()} (")


REFERENCE = """
import torch
from llmquant import native
from llmquant.kernels import ops, reference
from llmquant.kernels.layout import pack
from llmquant.scheme import Quantized, Scheme
scheme, x = Scheme(), torch.randn(3, 128)
codes = torch.arange(8 * 128).view(8, 128).to(torch.uint8) % 16
panels = pack(Quantized(codes, torch.ones(8, 1), torch.full((8, 1), 8, dtype=torch.uint8)), scheme)
y = torch.ops.llmquant.w4_linear(x, *panels, None, 8, 4, 128, 2)
assert torch.equal(y, reference.linear(x, panels, None, 8, scheme))
print(native.describe_backend())
"""


def test_the_reference_can_be_asked_for() -> None:
    environment = os.environ | {native.VARIABLE: "reference"}
    child = subprocess.run(
        [sys.executable, "-c", REFERENCE], env=environment, capture_output=True, text=True, check=True
    )
    assert child.stdout == "reference (LLMQUANT_BACKEND asks for it)\n"


def test_without_the_library_the_fallback_says_so(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "llmquant_cpu.so")
    assert native.describe_backend() == (
        f"reference (the native library cannot be used: there is no {native.LIBRARY}; "
        "install CMake and a C++ compiler, then llmquant again)"
    )
    monkeypatch.setenv(native.VARIABLE, "native")
    native.find_library.cache_clear()
    with pytest.raises(RecipeError, match="LLMQUANT_BACKEND: the native library cannot be used: there is no /"):
        native.active_backend()


def test_a_file_that_is_no_library_is_a_reason_not_a_crash(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    (tmp_path / "llmquant_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "llmquant_cpu.so")
    assert native.active_backend() == "reference"


def test_an_unknown_backend_is_refused_when_it_is_used_not_at_import() -> None:
    code = "from llmquant import native; print('imported'); native.active_backend()"
    environment = os.environ | {native.VARIABLE: "cuda"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert child.stdout == "imported\n"
    assert "RecipeError: LLMQUANT_BACKEND: 'cuda' is no backend; use native or reference" in child.stderr
