"""The native kernels against exact products, on every instruction set of this machine."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SCHEMES, relative_error, weight
from torch import nn

from llmquant.kernels.cpu import Native
from llmquant.kernels.layout import pack
from llmquant.native import LIBRARY, Library
from llmquant.scheme import Quantized, Scheme, dequantize

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


# Against the product of sizes: what rounding activations to integers may change, wherever the terms cancel.
BOUND = {1: 8e-3, 2: 6e-5}
PLANES = sorted(BOUND)
LARGEST = {1: 127, 2: 127 * 128 + 63}  # the integer that the largest activation of 32 becomes


def off(y: torch.Tensor, x: torch.Tensor, real: torch.Tensor, bias: torch.Tensor | None = None) -> float:
    """The error of y = x W^T + bias, relative to |x| |W|^T."""
    exact = x.double() @ real.T + (0 if bias is None else bias.double())
    return float((y.double() - exact).norm() / (x.double().abs() @ real.T.abs()).norm().clamp(min=1e-30))


def most_off(x: torch.Tensor, real: torch.Tensor, planes: int) -> torch.Tensor:
    """The largest error that each number of x W^T may have: half a step of every activation, and fp32 sums."""
    blocks = lambda tensor: nn.functional.pad(tensor.double().abs(), (0, -tensor.shape[1] % 32)).unflatten(1, (-1, 32))  # noqa: E731
    steps = blocks(x).amax(-1) / LARGEST[planes]
    return steps / 2 @ blocks(real).sum(-1).T + 1e-6 * (x.double().abs() @ real.T.abs())


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(9, 256), (39, 155), (1, 32), (80, 7)])
def test_products_are_right(scheme: Scheme, level: int, planes: int, m: int, n: int) -> None:
    w, bias = weight(scheme, m, n), random(m)
    for tokens in (1, 2, 3, 6, 15):
        x = random(tokens, n)
        y = NATIVE.linear(x, w.panels, bias, m, scheme, planes, level)
        assert off(y, x, w.real, bias) < BOUND[planes], tokens


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_instruction_sets_agree_on_many_tokens(scheme: Scheme, level: int, planes: int) -> None:
    """More tokens than one strip of tiles, no whole number of them, and rows that end within a panel."""
    w, x, bias = weight(scheme, 75, 191), random(290, 191), random(75)
    y = NATIVE.linear(x, w.panels, bias, 75, scheme, planes, level)
    assert off(y, x, w.real, bias) < BOUND[planes]
    baseline = NATIVE.linear(x, w.panels, bias, 75, scheme, planes, LEVELS[-1])
    torch.testing.assert_close(y, baseline, rtol=1e-5, atol=1e-5 * float(baseline.abs().max()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_results_that_no_cache_holds(kind: torch.dtype, level: int) -> None:
    """Whole lines of memory are written past the caches, and those of the last rows are not."""
    w, x, bias = weight(Scheme(4, 32), 2080, 64), random(560, 64).to(kind), random(2080).to(kind)
    y = NATIVE.linear(x, w.panels, bias, 2080, w.scheme, 1, level)
    rounding = torch.finfo(kind).eps if kind != torch.float32 else 0
    assert off(y, x, w.real, bias) < BOUND[1] + rounding
    some = torch.cat([NATIVE.linear(x[i : i + 8], w.panels, bias, 2080, w.scheme, 1, level) for i in (0, 272, 552)])
    assert torch.equal(y[[*range(8), *range(272, 280), *range(552, 560)]], some)


@settings(deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    level=st.sampled_from(LEVELS),
    planes=st.sampled_from(PLANES),
    m=st.integers(1, 70),
    n=st.integers(1, 200),
    tokens=st.integers(0, 33),
)
def test_any_shape(scheme: Scheme, level: int, planes: int, m: int, n: int, tokens: int) -> None:
    w, x = weight(scheme, m, n), random(tokens, n)
    y = NATIVE.linear(x, w.panels, None, m, scheme, planes, level)
    assert y.shape == (tokens, m)
    assert bool(((y.double() - x.double() @ w.real.T).abs() <= most_off(x, w.real, planes)).all())


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_whole_numbers_give_whole_numbers(scheme: Scheme, level: int, planes: int) -> None:
    """Activations that are integers themselves, the largest in every block: all sums are exact."""
    w = weight(scheme, 40, 161)
    limit = LARGEST[planes]
    x = torch.randint(-limit, limit + 1, (13, 161), generator=torch.Generator().manual_seed(1)).float()
    x[:, ::32] = limit
    y = NATIVE.linear(x, w.panels, None, 40, scheme, planes, level)
    assert relative_error(y, x.double() @ w.real.T) < 1e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_weight_is_read_back(scheme: Scheme, level: int) -> None:
    """One-hot activations: a wrong nibble, scale or zero point anywhere shows as itself."""
    w = weight(scheme, 23, 161)
    for planes in PLANES:
        y = NATIVE.linear(torch.eye(161), w.panels, None, 23, scheme, planes, level)
        torch.testing.assert_close(y.double(), w.real.T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_products_do_not_overflow(bits: int, level: int) -> None:
    """All codes and activations at their ends, in every sign: partial sums of 16 bits are at their limit."""
    for g in (32, -1):
        scheme = Scheme(bits, g, symmetric=False)
        m, n = 33, 1000
        codes = torch.full((m, n), scheme.max_code, dtype=torch.uint8)
        zeros = torch.zeros(m, scheme.groups(n), dtype=torch.uint8)
        zeros[::2] = scheme.max_code
        q = Quantized(codes, torch.ones(m, scheme.groups(n)), zeros)
        for x in (torch.ones(3, n), -torch.ones(3, n)):
            for planes in PLANES:
                y = NATIVE.linear(x, pack(q, scheme), None, m, scheme, planes, level)
                torch.testing.assert_close(y, x @ dequantize(q, scheme).T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_of_every_kind_and_size(kind: torch.dtype, level: int) -> None:
    """Negative ones too, and those of fp16 that are not normal."""
    scheme, m, n = Scheme(4, 32), 16, 64
    scales = (random(m, 2) * 2.0 ** torch.arange(-24, 8, dtype=torch.float32).view(m, 2)).to(kind).float()
    q = Quantized(torch.full((m, n), 11, dtype=torch.uint8), scales, torch.full((m, 2), 8, dtype=torch.uint8))
    panels = pack(q, scheme)._replace(scales=pack(q, scheme).scales.to(kind))
    real = dequantize(q, scheme)
    y = NATIVE.linear(torch.eye(n), panels, None, m, scheme, 2, level)
    torch.testing.assert_close(y, real.T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_finite_reaches_its_token_alone(level: int, planes: int) -> None:
    w, x = weight(Scheme(4, 32), 20, 96), random(4, 96)
    x[1, 40], x[2, 95] = torch.nan, -torch.inf
    y = NATIVE.linear(x, w.panels, None, 20, w.scheme, planes, level)
    assert y[1:3].isnan().all()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("level", LEVELS)
def test_zeros_and_huge_activations(level: int) -> None:
    w = weight(Scheme(4, 32), 20, 96)
    for x in (torch.zeros(2, 96), random(2, 96) * 1e-35, random(2, 96) * 1e30):
        y = NATIVE.linear(x, w.panels, None, 20, w.scheme, 2, level)
        assert off(y, x, w.real) < BOUND[2] or bool((y == 0).all() and x.abs().max() < 1e-30)


@pytest.mark.parametrize("planes", PLANES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_token_does_not_depend_on_its_company(level: int, planes: int) -> None:
    w, x = weight(Scheme(4, 32, symmetric=False), 85, 96), random(31, 96)
    together = NATIVE.linear(x, w.panels, None, 85, w.scheme, planes, level)
    alone = torch.cat([NATIVE.linear(x[i : i + 1], w.panels, None, 85, w.scheme, planes, level) for i in range(31)])
    assert torch.equal(together, alone)


def test_the_number_of_threads_changes_nothing() -> None:
    w = weight(Scheme(4, 32), 256, 64)
    x = random(8, 64).repeat(2, 1)  # enough work to be shared
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(NATIVE.linear(x, w.panels, None, 256, w.scheme, 2))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_go_in_and_out_as_torch_rounds_them(dtype: torch.dtype, level: int) -> None:
    """From the smallest to what no longer fits, and what is not finite."""
    w = weight(Scheme(4, 32), 21, 64)
    x = (random(60, 64) * 2.0 ** torch.linspace(-30, 13, 60).unsqueeze(1)).to(dtype)
    x[7, 3], x[9, 60] = torch.inf, torch.nan
    for bias in (random(21).to(dtype), random(21) * 1e5, None):
        y = NATIVE.linear(x, w.panels, bias, 21, w.scheme, 2, level)
        wide = None if bias is None else bias.float()
        expected = NATIVE.linear(x.float(), w.panels, wide, 21, w.scheme, 2, level)
        torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert dtype == torch.bfloat16 or bias is None or not bias.abs().max() > 1e5 or y.isinf().any()
    assert (y.abs() < 2**-14).any()


def test_exact_errs_less_than_bf16_does() -> None:
    w, x = weight(Scheme(4, 128), 64, 1024), random(8, 1024)
    exact = x.double() @ w.real.T
    halves = (x.bfloat16().float() @ w.real.float().T).double()
    assert relative_error(NATIVE.linear(x, w.panels, None, 64, w.scheme), exact) < relative_error(halves, exact) / 8
    assert relative_error(NATIVE.linear(x, w.panels, None, 64, w.scheme, 1), exact) < 6.6e-3


def test_leading_dimensions_and_no_tokens() -> None:
    w = weight(Scheme(4, 32), 8, 64)
    assert NATIVE.linear(random(2, 3, 64), w.panels, None, 8, w.scheme).shape == (2, 3, 8)
    assert NATIVE.linear(random(64), w.panels, None, 8, w.scheme).shape == (8,)
    assert NATIVE.linear(random(0, 64), w.panels, None, 8, w.scheme).shape == (0, 8)


GUARDED = """
import ctypes, mmap, sys
import torch
from llmquant.kernels.cpu import Native
from llmquant.kernels.layout import Packed
from llmquant.native import Library
from llmquant.scheme import Scheme

library, page = Library(), mmap.PAGESIZE
native = Native(library)
memory = mmap.mmap(-1, 2 * page)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
for bits in (4, 8):
    for n in (7, 31, 33, 64, 90):
        m, scheme = 19, Scheme(bits, -1)
        steps = -(-n // 32) * bits
        size = 2 * steps * 64
        codes = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=page - size).view(2, steps, 16, 4)
        panels = Packed(codes, torch.ones(2, 1, 16, dtype=torch.bfloat16), None)
        assert libc.mprotect(address + page, page, 0) == 0
        for level in range(len(library.levels)):
            for planes in (1, 2):
                native.linear(torch.ones(3, n), panels, None, m, scheme, planes, level)
print("inside")
if len(sys.argv) > 1:
    ctypes.string_at(address + page, 1)
"""


def test_no_byte_after_the_codes_is_read() -> None:
    """The codes end where a forbidden page begins. With an argument the child steps over, to show that it would die."""
    for arguments, outcome in ([], 0), (["over"], -11):
        child = subprocess.run([sys.executable, "-c", GUARDED, *arguments], capture_output=True, text=True, check=False)
        assert (child.stdout, child.returncode) == ("inside\n", outcome), child.stderr
