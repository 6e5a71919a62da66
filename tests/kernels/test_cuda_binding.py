"""kernels/cuda.py with csrc/cuda compiled for the CPU: what it hands over, and what it makes of the answers."""

import pytest
import torch
from kernel_cases import relative_error, weight

from llmquant import native
from llmquant.errors import RecipeError
from llmquant.kernels import cuda
from llmquant.scheme import Quantized, Scheme
from llmquant.solve import columns, grid
from llmquant.solve import cuda as solve_cuda

SCHEMES = [Scheme(4, g, symmetric) for g in (32, 128, -1) for symmetric in (True, False)]
# Activations, sums in fp32 and outputs of these dtypes.
BOUND = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def library(emulated_library: native.CudaLibrary) -> native.CudaLibrary:
    return emulated_library


@pytest.mark.parametrize("shape", [(64, 64), (70, 150), (129, 33)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_weight_comes_back(scheme: Scheme, shape: tuple[int, int]) -> None:
    w = weight(scheme, *shape)
    packed = cuda.pack(w.q, scheme)
    assert all(map(torch.equal, cuda.unpack(packed, *shape, scheme), w.q))
    real = cuda.dequantize(packed, 0, shape[0], *shape, scheme, torch.float32)
    assert torch.equal(real.double(), w.real)


@pytest.mark.parametrize("scale", [1 + 2**-20, 65536.0])
def test_scales_that_no_kernel_can_hold_are_refused(scale: float) -> None:
    codes, zeros = torch.zeros(4, 32, dtype=torch.uint8), torch.full((4, 1), 8, dtype=torch.uint8)
    message = "LLMQUANT_BACKEND: cuda needs scales below 65536 that are exact in bf16 or in fp16; use triton"
    with pytest.raises(RecipeError, match=message):
        cuda.pack(Quantized(codes, torch.full((4, 1), scale), zeros), Scheme(4, 32))


def test_what_the_library_refuses_is_said(library: native.CudaLibrary) -> None:
    with pytest.raises(RuntimeError, match="llmquant_cuda_sizes: "):
        cuda.shapes(0, 32, Scheme(4, 32))


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("m", "n", "tokens"), [(64, 128, 1), (70, 150, 5), (129, 33, 20)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_products(scheme: Scheme, m: int, n: int, tokens: int, dtype: torch.dtype) -> None:
    """Columns that 16 bytes do not divide, scales in another dtype than x, a bias in a third one."""
    w, bias = weight(scheme, m, n), torch.linspace(-1, 1, m)
    x = torch.randn(tokens, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = cuda.linear(x, cuda.pack(w.q, scheme), bias, m, scheme)
    assert y.dtype == dtype
    assert relative_error(y, x.double() @ w.real.T + bias.double()) < BOUND[dtype]


def test_products_in_graphs_share_no_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device("cpu")
    assert cuda._tickets(here, 5).data_ptr() == cuda._tickets(here, 7).data_ptr()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    first, second = cuda._tickets(here, 5), cuda._tickets(here, 7)
    assert (len(first), len(second)) == (5, 7)
    assert second.data_ptr() == first.data_ptr() + 5 * 4


def test_scales_that_another_dtype_would_round_keep_theirs() -> None:
    """They are multiplied in slabs, which is slow, and right."""
    assert cuda._scales(torch.tensor([1 + 2.0**-10]).half(), torch.bfloat16) is None
    scales = torch.tensor([0.5]).bfloat16()
    assert cuda._scales(scales, torch.float16) is cuda._scales(scales, torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_tokens_go_through_slabs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.slabs, "SLAB", 0)
    monkeypatch.setattr(cuda, "_needs", lambda *_: None)
    w, bias = weight(Scheme(4, 32, symmetric=False), 150, 72), torch.arange(150.0)
    x = torch.randn(2, 9, 72, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = cuda.linear(x, cuda.pack(w.q, w.scheme), bias, 150, w.scheme)
    assert y.shape == (2, 9, 150)
    assert y.dtype == dtype
    assert relative_error(y, x.double() @ w.real.T + bias) < BOUND.get(dtype, 1e-6)


def test_no_tokens_give_none() -> None:
    w = weight(Scheme(4, 32), 8, 64)
    assert cuda.linear(torch.empty(2, 0, 64), cuda.pack(w.q, w.scheme), None, 8, w.scheme).shape == (2, 0, 8)


# ---- the column loop of the solver


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32, symmetric=False)], ids=str)
def test_rounding(scheme: Scheme, search: bool, library: native.CudaLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed over is what the definition in torch is given. Some of all grids: it takes its time."""
    generator = torch.Generator().manual_seed(0)
    X, work = torch.randn(256, 70, generator=generator), torch.randn(64, 21, generator=generator)
    U = torch.linalg.cholesky(torch.linalg.inv(X.T @ X / 256), upper=True).contiguous()
    few = grid.candidates(scheme)[::7]
    monkeypatch.setattr(grid, "candidates", lambda _: few)
    monkeypatch.setattr(columns, "_library", lambda _: None)
    scales, zeros = columns.search_columns(work, torch.ones(64), 32, scheme)
    given = (work.clone(), scales, zeros, torch.empty(64, 21, dtype=torch.uint8))
    mine = tuple(part.clone() for part in given)
    columns.round_columns(given[0], U, *given[1:], 32, scheme, search=search)
    pivots = U.diagonal()[:64].reciprocal()
    solve_cuda.round_columns(library, mine[0], U, pivots, *mine[1:], 32, scheme, few if search else None)
    same = (mine[3] == given[3]).all(0)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(mine[0][:, same], given[0][:, same], rtol=1e-4, atol=1e-5)
