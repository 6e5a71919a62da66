"""The torch operator, and the choice of its backend."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import SCHEMES, Weight, weight

from llmquant.errors import RecipeError
from llmquant.kernels import cpu, ops, reference
from llmquant.scheme import Scheme

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int]


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Let a test choose a backend, and the next one choose again."""
    ops._backend.cache_clear()
    yield
    ops._backend.cache_clear()


def operands(w: Weight, bias: torch.Tensor | None = None) -> Operands:
    return (*w.operands, bias, w.scheme.bits, w.scheme.group_size)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_operator_is_the_reference(scheme: Scheme, tokens: int) -> None:
    w, x, bias = weight(scheme, 8, 160), torch.randn(2, tokens, 160), torch.randn(8)
    y = torch.ops.llmquant.w4_linear(x, *operands(w, bias))
    torch.testing.assert_close(y, reference.linear(x, *w.operands, bias, scheme), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_accepts_the_operator(dtype: torch.dtype) -> None:
    w = weight(Scheme(4, 32, symmetric=False), 8, 64)
    for x in (torch.randn(3, 64, dtype=dtype), torch.randn(2, 1, 64, dtype=dtype)):
        torch.library.opcheck(torch.ops.llmquant.w4_linear.default, (x, *operands(w, torch.randn(8))))
        torch.library.opcheck(torch.ops.llmquant.w4_linear.default, (x, *operands(w)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("packed", lambda x, p, s, z, b: (x, p[:, 1:], s, z, b)),
        ("packed", lambda x, p, s, z, b: (x, p.to(torch.int8), s, z, b)),
        ("packed", lambda x, p, s, z, b: (x, p.T.contiguous().T, s, z, b)),
        ("scales", lambda x, p, s, z, b: (x, p, s[:, :1], z, b)),
        ("scales", lambda x, p, s, z, b: (x, p, s.half(), z, b)),
        ("zeros", lambda x, p, s, z, b: (x, p, s, z[:1], b)),
        ("bias", lambda x, p, s, z, b: (x, p, s, z, b[:1])),
        ("x", lambda x, p, s, z, b: (x.long(), p, s, z, b)),
    ],
)
def test_sizes_are_checked_before_native_code_trusts_them(name: str, change: object) -> None:
    w = weight(Scheme(4, 32, symmetric=False), 8, 64)
    assert callable(change)
    changed = change(torch.randn(2, 64), *w.operands, torch.randn(8))
    with pytest.raises(ValueError, match=f"w4_linear: {name} is "):
        torch.ops.llmquant.w4_linear(*changed, 4, 32)


def test_the_native_library_is_taken_where_it_is(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    assert ops.active_backend() == ("native" if cpu.LIBRARY.is_file() else "reference")
    assert ops.describe_backend().startswith(f"{ops.active_backend()} (")


def test_the_reference_can_be_asked_for(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.VARIABLE, "reference")
    assert ops.describe_backend() == "reference (LLMQUANT_BACKEND asks for it)"
    w, x = weight(Scheme(), 8, 128), torch.randn(3, 128)
    y = torch.ops.llmquant.w4_linear(x, *operands(w))
    assert torch.equal(y, reference.linear(x, *w.operands, None, w.scheme))


def test_without_the_library_the_fallback_says_so(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "llmquant_cpu.so")
    assert ops.describe_backend() == (
        "reference (the native library cannot be used: it was not built; "
        "install CMake and a C++ compiler, then llmquant again)"
    )
    monkeypatch.setenv(ops.VARIABLE, "native")
    ops._backend.cache_clear()
    with pytest.raises(RecipeError, match="LLMQUANT_BACKEND: the native library cannot be used: it was not built"):
        ops.active_backend()


def test_a_file_that_is_no_library_is_a_reason_not_a_crash(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(ops.VARIABLE, raising=False)
    (tmp_path / "llmquant_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "llmquant_cpu.so")
    assert ops.active_backend() == "reference"


def test_an_unknown_backend_is_refused_when_it_is_used_not_at_import() -> None:
    code = "from llmquant.kernels import ops; print('imported'); ops.active_backend()"
    environment = os.environ | {ops.VARIABLE: "cuda"}
    child = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert child.stdout == "imported\n"
    assert "RecipeError: LLMQUANT_BACKEND: 'cuda' is no backend; use native or reference" in child.stderr
