"""Refit and descent: each against its closed form, and neither ever makes a row worse."""

from itertools import product

import pytest
import torch

from llmquant.scheme import Quantized, Scheme, dequantize
from llmquant.solve.refine import REFIT_ROWS, descend, refine, refit_scales
from llmquant.solve.rtn import quantize_rtn

SCHEMES = [Scheme(4, g, symmetric) for g in (32, 64, -1) for symmetric in (True, False)]


def problem(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * n, n, generator=generator) @ (torch.eye(n) + 0.15 * torch.randn(n, n, generator=generator))
    return torch.randn(m, n, generator=generator) * 0.05, X.T @ X / len(X)


def row_losses(W: torch.Tensor, q: Quantized, scheme: Scheme, H: torch.Tensor) -> torch.Tensor:
    """tr(E H E^T) row by row, fp64 [m]."""
    E = (W - dequantize(q, scheme)).double()
    return (E @ H.double()).mul_(E).sum(1)


def integers(q: Quantized, scheme: Scheme) -> torch.Tensor:
    return q.codes.double() - q.zeros.repeat_interleave(scheme.width(q.codes.shape[1]), 1).double()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_refit_solves_the_least_squares_problem_of_each_row(scheme: Scheme) -> None:
    W, H = problem(8, 128)
    q = quantize_rtn(W, scheme)
    refit = refit_scales(W, H, q, scheme)
    root = torch.linalg.cholesky(H.double())  # ||root^T (w - Z s)|| is the row's loss
    for row in range(8):
        Z = torch.zeros(128, scheme.groups(128), dtype=torch.float64)
        Z[torch.arange(128), torch.arange(128) // scheme.width(128)] = integers(q, scheme)[row]
        exact = torch.linalg.lstsq(root.T @ Z, (root.T @ W[row].double()).unsqueeze(1)).solution.squeeze(1)
        assert torch.allclose(refit.scales[row].double(), exact, rtol=2**-8)
    assert torch.equal(refit.scales, refit.scales.half().float())
    assert torch.equal(refit.scales, refit.scales.bfloat16().float())
    assert torch.equal(refit.codes, q.codes)


@pytest.mark.parametrize("step", [refit_scales, descend], ids=["refit", "descent"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_row_gets_worse(step, scheme: Scheme) -> None:
    W, H = problem(16, 128)
    before = quantize_rtn(W, scheme)
    after = step(W, H, before, scheme)
    assert (row_losses(W, after, scheme, H) <= row_losses(W, before, scheme, H)).all()
    assert row_losses(W, after, scheme, H).sum() < 0.99 * row_losses(W, before, scheme, H).sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_do_not_depend_on_each_other(scheme: Scheme) -> None:
    """More of them than are taken at a time."""
    W, H = problem(REFIT_ROWS + 44, 64)
    q = quantize_rtn(W, scheme)
    whole = refit_scales(W, H, q, scheme)
    last = refit_scales(W[-50:], H, Quantized(*(part[-50:] for part in q)), scheme)
    assert (whole.scales[-50:] == last.scales).float().mean() > 0.95  # sums of other lengths end in other last bits


def test_descent_ends_where_no_single_code_can_be_better() -> None:
    scheme = Scheme(4, 32)
    W, H = problem(2, 32)
    q = quantize_rtn(W, scheme)
    for _ in range(50):
        q = descend(W, H, q, scheme)
    loss = row_losses(W, q, scheme, H)
    for column, code in product(range(32), range(16)):
        changed = q.codes.clone()
        changed[:, column] = code
        assert (row_losses(W, q._replace(codes=changed), scheme, H) >= loss * (1 - 1e-5)).all()


def test_descent_comes_near_the_best_of_all_codes() -> None:
    """Four columns of 16 codes: all of them can be tried."""
    scheme = Scheme(4, -1)
    W, H = problem(3, 4)
    q = quantize_rtn(W, scheme)
    every = torch.tensor(list(product(range(16), repeat=4)), dtype=torch.uint8)
    for row in range(3):
        alone = Quantized(q.codes[row : row + 1], q.scales[row : row + 1], q.zeros[row : row + 1])
        found = alone
        for _ in range(10):
            found = descend(W[row : row + 1], H, found, scheme)
        values = q.scales[row] * (every.float() - 8)
        E = W[row] - values
        best = ((E @ H) * E).sum(1).min()
        assert row_losses(W[row : row + 1], found, scheme, H) <= 1.5 * best
        assert row_losses(W[row : row + 1], alone, scheme, H) >= best * (1 - 1e-5)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_together_they_go_below_either(scheme: Scheme) -> None:
    W, H = problem(16, 128)
    q = quantize_rtn(W, scheme)
    both = row_losses(W, refine(W, H, q, scheme, 2), scheme, H).sum()
    assert both < row_losses(W, refit_scales(W, H, q, scheme), scheme, H).sum()
    assert both < row_losses(W, descend(W, H, q, scheme), scheme, H).sum()
    assert refine(W, H, q, scheme, 0) is q


def test_an_empty_group_and_a_dead_column_do_no_harm() -> None:
    scheme = Scheme(4, 32)
    W, H = problem(4, 64)
    W[:, :32] = 0
    H[40], H[:, 40] = 0, 0
    q = quantize_rtn(W, scheme)
    after = refine(W, H, q, scheme, 2)
    assert torch.isfinite(dequantize(after, scheme)).all()
    assert (row_losses(W, after, scheme, H) <= row_losses(W, q, scheme, H)).all()
    assert torch.equal(after.codes[:, 40], q.codes[:, 40])  # no input ever reaches it: nothing to gain, nothing to move
