"""Which backend computes on the CPU, and what is said about it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmquant import native
from llmquant.errors import RecipeError


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Let a test choose a backend, and the next one choose again."""
    for find in (native.find_library, native.find_gpu_backend):
        find.cache_clear()
    yield
    for find in (native.find_library, native.find_gpu_backend):
        find.cache_clear()


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
    environment = os.environ | {native.VARIABLE: "opencl"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert child.stdout == "imported\n"
    assert "LLMQUANT_BACKEND: 'opencl' is no backend; use native, cuda, triton or reference" in child.stderr


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc, which is Linux's")
def test_threads_are_let_go(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    if native.active_backend() != "native" or not native.Library().functions.llmquant_threaded():
        pytest.skip("the native library was not built, or without OpenMP")
    x, threads = torch.randn(1 << 20), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        before = x.exp().sum()
        there = len(os.listdir("/proc/self/task"))
        native.release_threads()
        assert len(os.listdir("/proc/self/task")) <= there - 2
        assert torch.equal(x.exp().sum(), before)
    finally:
        torch.set_num_threads(threads)


# ---- on GPUs

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@NO_GPU
@pytest.mark.parametrize("name", native.GPU_BACKENDS)
def test_a_gpu_backend_without_a_gpu_is_refused(name: str, fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, too: who asked for it would otherwise not know that it does not compute."""
    monkeypatch.setenv(native.VARIABLE, name)
    with pytest.raises(RecipeError, match=f"LLMQUANT_BACKEND: {name} cannot be used: torch .* sees no CUDA device"):
        native.active_backend()


@NO_GPU
def test_what_a_gpu_would_get_and_why(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    no = f"cannot be used: torch {torch.__version__} sees no CUDA device"
    assert native.describe_gpu_backend() == f"reference (cuda {no}; triton {no})"


def devices(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """As if torch saw GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)


def test_triton_takes_the_place_of_a_library_that_is_not_there(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    devices(monkeypatch, (9, 0))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "CUDA_LIBRARY", tmp_path / "llmquant_cuda.so")
    assert native.describe_gpu_backend() == (
        f"triton (cuda cannot be used: there is no {native.CUDA_LIBRARY}; "
        "install nvcc, then llmquant again with LLMQUANT_CUDA=1)"
    )


def test_a_gpu_that_is_too_old_gets_plain_torch(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    devices(monkeypatch, (9, 0), (7, 5))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    assert native.find_gpu_backend().name == "reference"
    assert "compute capability 7.5; 8.0 is needed" in native.describe_gpu_backend()
    monkeypatch.setenv(native.VARIABLE, "triton")
    native.find_gpu_backend.cache_clear()
    with pytest.raises(RecipeError, match=r"triton cannot be used: a GPU has compute capability 7\.5"):
        native.find_gpu_backend()


def test_how_the_cuda_library_is_called_is_said(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through Python where the binding is not there, or is none."""
    devices(monkeypatch, (9, 0))
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "CudaLibrary", object)
    monkeypatch.setattr(native, "CUDA_BINDING", tmp_path / "llmquant_torch_cuda.so")
    assert native.describe_gpu_backend() == (
        f"cuda (llmquant_cuda.so, called through Python: there is no {native.CUDA_BINDING}; "
        "install llmquant again with --no-build-isolation)"
    )
    native.CUDA_BINDING.write_bytes(b"not a library")
    native.find_gpu_backend.cache_clear()
    words = f"cuda (llmquant_cuda.so, called through Python: llmquant_torch_cuda.so cannot be used: {tmp_path}"
    assert native.describe_gpu_backend().startswith(words)
