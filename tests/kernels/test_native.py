"""The native kernels against exact products, on every instruction set of this machine."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SCHEMES, relative_error, weight

from llmquant.kernels import cpu
from llmquant.kernels.cpu import PANEL_TOKENS, Native
from llmquant.native import LIBRARY, Library
from llmquant.scheme import Scheme

if not LIBRARY.is_file():
    pytest.skip("the native library was not built", allow_module_level=True)

LIBRARY_IN_USE = Library()
NATIVE = Native(LIBRARY_IN_USE)
LEVELS = range(len(LIBRARY_IN_USE.levels))


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_the_baseline_is_always_there() -> None:
    assert LIBRARY_IN_USE.levels[-1] == "baseline"
    assert str(LIBRARY_IN_USE).startswith(LIBRARY_IN_USE.levels[0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(9, 256), (6, 155), (1, 32), (3, 7)])
def test_products_are_right(scheme: Scheme, level: int, m: int, n: int) -> None:
    w, bias = weight(scheme, m, n), random(m)
    for tokens in (1, 2, 3, 8, 15):
        x = random(tokens, n)
        y = NATIVE.stream(x, *w.operands, bias, scheme, level)
        assert relative_error(y, x.double() @ w.real.T + bias) < 1e-6, tokens


@settings(deadline=None)
@given(st.sampled_from(SCHEMES), st.sampled_from(LEVELS), st.integers(1, 11), st.integers(1, 200), st.integers(0, 17))
def test_any_shape(scheme: Scheme, level: int, m: int, n: int, tokens: int) -> None:
    w, x = weight(scheme, m, n), random(tokens, n)
    y = NATIVE.stream(x, *w.operands, None, scheme, level)
    torch.testing.assert_close(y.double(), x.double() @ w.real.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_weight_is_read_back_exactly(scheme: Scheme, level: int) -> None:
    """One-hot activations: a wrong nibble, scale or zero point anywhere shows as itself."""
    w = weight(scheme, 7, 161)
    y = NATIVE.stream(torch.eye(161), *w.operands, None, scheme, level)
    assert torch.equal(y.double(), w.real.T)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("n", [160, 161])
def test_dequantized_weight_is_exact(scheme: Scheme, level: int, n: int) -> None:
    w = weight(scheme, 7, n)
    assert torch.equal(NATIVE.dequantize(*w.operands, scheme, torch.empty(7, n), level).double(), w.real)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_panels_agree(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PANEL_BYTES", 4 * 96 * 5)  # several panels, the last one partial
    w, x, bias = weight(scheme, 13, 96), random(40, 96), random(13)
    assert relative_error(NATIVE.panels(x, *w.operands, bias, scheme), x.double() @ w.real.T + bias) < 1e-6


@pytest.mark.parametrize("level", LEVELS)
def test_a_token_does_not_depend_on_its_company(level: int) -> None:
    w, x = weight(Scheme(4, 32, symmetric=False), 11, 96), random(15, 96)
    together = NATIVE.stream(x, *w.operands, None, w.scheme, level)
    alone = torch.cat([NATIVE.stream(x[i : i + 1], *w.operands, None, w.scheme, level) for i in range(15)])
    assert torch.equal(together, alone)


def test_the_number_of_threads_changes_nothing() -> None:
    w = weight(Scheme(4, 32), 256, 64)
    x = random(8, 64).repeat(2, 1)  # enough work to be shared
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(NATIVE.stream(x, *w.operands, None, w.scheme))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("tokens", [1, PANEL_TOKENS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtype_and_strides_at_the_door(dtype: torch.dtype, tokens: int) -> None:
    w = weight(Scheme(4, 32), 8, 64)
    x, bias = random(64, tokens).T.to(dtype), random(8).to(dtype)
    y = NATIVE.linear(x, *w.operands, bias, w.scheme)
    assert y.dtype == dtype
    exact = x.double() @ w.real.T + bias.double()
    assert relative_error(y, exact) < 2 * torch.finfo(dtype).eps


def test_leading_dimensions_and_no_tokens() -> None:
    w = weight(Scheme(4, 32), 8, 64)
    assert NATIVE.linear(random(2, 3, 64), *w.operands, None, w.scheme).shape == (2, 3, 8)
    assert NATIVE.linear(random(64), *w.operands, None, w.scheme).shape == (8,)
    assert NATIVE.linear(random(0, 64), *w.operands, None, w.scheme).shape == (0, 8)


GUARDED = """
import ctypes, mmap, sys
import torch
from llmquant.kernels.cpu import Native
from llmquant.native import Library
from llmquant.scheme import Scheme

library, page = Library(), mmap.PAGESIZE
native = Native(library)
memory = mmap.mmap(-1, 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
for bits in (4, 8):
    for n in (7, 31, 33, 64, 155):
        m, scheme = 3, Scheme(bits, -1)
        size = m * -(-n * bits // 8)
        packed = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=page - size).view(m, -1)
        assert libc.mprotect(address + page, page, 0) == 0
        for level in range(len(library.levels)):
            native.stream(torch.ones(3, n), packed, torch.ones(m, 1), None, None, scheme, level)
            native.dequantize(packed, torch.ones(m, 1), None, scheme, torch.empty(m, n), level)
print("inside")
if len(sys.argv) > 1:
    ctypes.string_at(address + page, 1)
"""


def test_no_byte_after_the_codes_is_read() -> None:
    """The codes end where a forbidden page begins. With an argument the child steps over, to show that it would die."""
    for arguments, outcome in ([], 0), (["over"], -11):
        child = subprocess.run([sys.executable, "-c", GUARDED, *arguments], capture_output=True, text=True, check=False)
        assert (child.stdout, child.returncode) == ("inside\n", outcome), child.stderr
