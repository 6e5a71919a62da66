"""The product in Triton against float64 from the integers; in Triton's interpreter where there is no GPU."""

from functools import cache

import pytest
import torch
from kernel_cases import SCHEMES, Weight, relative_error
from kernel_cases import weight as make
from torch import Tensor
from triton_cases import DEVICE

from llmquant.kernels import reference
from llmquant.kernels.tuning import Config
from llmquant.scheme import Scheme

triton = pytest.importorskip("llmquant.kernels.triton", reason="needs Triton", exc_type=ImportError)

# A product of exact operands is summed in fp32 and rounded once; the interpreter cuts what becomes bf16.
BOUND = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}
SMALL, WIDE = Config(32, 16, 1, 4, 3), Config(64, 32, 1, 4, 3)
SHAPES = [(1, 1, 1), (129, 200, 17), (16, 33, 33)]  # out features, in features, tokens
weight = cache(make)


def on_device(w: Weight) -> "triton.Packed":
    return triton.Packed(*(part if part is None else part.to(DEVICE) for part in triton.pack(w.q, w.scheme)))


def rows(tokens: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(n)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_weight_comes_back(scheme: Scheme, shape: tuple[int, int, int]) -> None:
    m, n, _ = shape
    w = weight(scheme, m, n)
    packed = triton.pack(w.q, scheme)
    assert (packed.codes.shape, packed.scales.shape) == triton.shapes(m, n, scheme)[:2]
    assert all(map(torch.equal, triton.unpack(packed, m, n, scheme), w.q))


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("scheme", "shape"),
    [(scheme, (70, 150, 5)) for scheme in SCHEMES] + [(Scheme(4, 64, symmetric=False), shape) for shape in SHAPES],
    ids=str,
)
def test_it_is_as_exact_as_its_output(scheme: Scheme, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, tokens = shape
    w, x, bias = weight(scheme, m, n), rows(tokens, n, dtype), torch.linspace(-1, 1, m).to(dtype)
    y = triton.linear(x.to(DEVICE), on_device(w), bias.to(DEVICE), m, scheme, SMALL)
    assert y.dtype == dtype
    assert relative_error(y.cpu(), x.double() @ w.real.T + bias.double()) < BOUND[dtype]


@pytest.mark.parametrize("config", [SMALL, WIDE, Config(128, 16, 4, 4, 2)], ids=str)
def test_whole_numbers_are_exact(config: Config) -> None:
    """Every product and sum fits fp32, so any order of them gives the same bits."""
    w = weight(Scheme(4, 64, symmetric=False), 70, 700)
    x = rows(19, 700).mul(4).round()
    y = triton.linear(x.to(DEVICE), on_device(w), None, 70, w.scheme, config)
    assert torch.equal(y.cpu().double(), x.double() @ w.real.T)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_one_activation_reads_one_column(scheme: Scheme) -> None:
    w = weight(scheme, 33, 70)
    y = triton.linear(torch.eye(70, device=DEVICE), on_device(w), None, 33, scheme, WIDE)
    assert torch.equal(y.cpu().double(), w.real.T)


@pytest.mark.parametrize("split", [2, 3, 8])
def test_parts_of_a_sum(split: int) -> None:
    """More parts than steps, too; the bias is added once."""
    w, x, bias = weight(Scheme(4, 128), 40, 900), rows(3, 900), torch.arange(40.0)
    y = triton.linear(x.to(DEVICE), on_device(w), bias.to(DEVICE), 40, w.scheme, Config(32, 16, split, 4, 3))
    assert relative_error(y.cpu(), x.double() @ w.real.T + bias) < BOUND[torch.float32]


@pytest.mark.parametrize("split", [1, 4])
def test_tokens_do_not_see_each_other(split: int) -> None:
    w, x = on_device(weight(Scheme(4, 32), 48, 320)), rows(20, 320).to(DEVICE)
    before = triton.linear(x, w, None, 48, Scheme(4, 32), Config(32, 16, split, 4, 3))
    x[7], x[18:] = float("nan"), 1e4
    after = triton.linear(x, w, None, 48, Scheme(4, 32), Config(32, 16, split, 4, 3))
    untouched = [i for i in range(18) if i != 7]
    assert torch.equal(after[untouched], before[untouched])
    assert after[7].isnan().all()


def test_it_is_what_the_reference_is() -> None:
    w, x = weight(Scheme(4, 32, symmetric=False), 24, 96), rows(6, 96).view(2, 3, 96)
    y = triton.linear(x.to(DEVICE), on_device(w), None, 24, w.scheme)
    assert y.shape == (2, 3, 24)
    torch.testing.assert_close(y.cpu(), reference.linear(x, w.panels, None, 24, w.scheme))
    assert triton.linear(x[:, :0].to(DEVICE), on_device(w), None, 24, w.scheme).shape == (2, 0, 24)


def test_many_tokens_meet_dequantized_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "most_tokens", lambda _: 30)
    monkeypatch.setattr(triton.slabs, "SLAB", 0)
    w, x, bias = weight(Scheme(4, 32), 150, 70), rows(31, 70), torch.arange(150.0)
    y = triton.linear(x.to(DEVICE), on_device(w), bias.to(DEVICE), 150, w.scheme)
    assert relative_error(y.cpu(), x.double() @ w.real.T + bias) < BOUND[torch.float32]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dequantized_rows(scheme: Scheme) -> None:
    w = weight(scheme, 150, 70)
    packed = on_device(w)
    assert torch.equal(triton.dequantize(packed, 0, 150, 70, scheme, torch.float32).cpu().double(), w.real)
    some = triton.dequantize(packed, 128, 22, 70, scheme, torch.float16).cpu()
    assert torch.equal(some, w.real[128:].half())
