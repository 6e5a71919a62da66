"""GPTQ against its own definition, written the slow way, and against round-to-nearest."""

import pytest
import torch

from llmquant.scheme import Quantized, Scheme, dequantize
from llmquant.solve.gptq import quantize_gptq, relative_error
from llmquant.solve.grid import search_grid
from llmquant.solve.hessian import inverse_factor
from llmquant.solve.rtn import quantize_rtn

SCHEMES = [Scheme(4, g, symmetric) for g in (32, 64, 128, -1) for symmetric in (True, False)]


def problem(m: int, n: int, seed: int = 0, k: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs of uneven size, as behind a norm: (W, H)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(n) + torch.randn(n, n, generator=generator) * 0.15
    X = torch.randn(k, n, generator=generator) @ mix * torch.exp(torch.randn(n, generator=generator))
    return torch.randn(m, n, generator=generator) * 0.05, X.T @ X / k


def column_by_column(W: torch.Tensor, H: torch.Tensor, scheme: Scheme) -> tuple[Quantized, float]:
    """The algorithm as the paper states it, in float64: after each column the rest is re-optimised exactly.

    w_rest += (w_j - q_j) H_j,rest H_rest,rest^-1: no Cholesky factor, no blocks. Also returns the loss.
    """
    n = W.shape[1]
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    factor = inverse_factor(H[order][:, order])
    damped = (H + factor.damping * H.diagonal().mean() * torch.eye(n)).double()
    scales, zeros = search_grid(W, H.diagonal() + factor.damping * H.diagonal().mean(), scheme)
    rest, codes = W.double().clone(), torch.zeros_like(W, dtype=torch.uint8)
    for i, j in enumerate(order.tolist()):
        s, z = scales[:, j // scheme.width(n)].double(), zeros[:, j // scheme.width(n)].double()
        code = (torch.round(rest[:, j] / s) + z).clamp(0, scheme.max_code)
        codes[:, j] = code.to(torch.uint8)
        error = rest[:, j] - (code - z) * s
        later = order[i + 1 :]
        if len(later):
            step = torch.linalg.solve(damped[later][:, later], damped[later, j])
            rest[:, later] += torch.outer(error, step)
    q = Quantized(codes, scales, zeros)
    difference = W.double() - dequantize(q, scheme).double()
    return q, float(((difference @ damped) * difference).sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_the_definition(scheme: Scheme) -> None:
    W, H = problem(12, 256)
    expected, _ = column_by_column(W, H, scheme)
    q, factor = quantize_gptq(W, H, scheme)
    assert factor.rung == "fp32"
    # fp32 against float64: a weight on the edge between two codes may fall to the other side, hardly ever
    assert (q.codes == expected.codes).float().mean() > 0.995
    assert torch.equal(q.scales, expected.scales)


def test_loss_is_the_sum_of_the_normalised_errors() -> None:
    """tr(D H D^T) = sum of e^2: what GPTQ adds up column by column is the layer's true output error."""
    W, H = problem(6, 64)
    scheme = Scheme(4, 32)
    q, loss = column_by_column(W, H, scheme)
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    U = inverse_factor(H[order][:, order]).U.double()
    difference = (W.double() - dequantize(q, scheme).double())[:, order]
    # e U = D (as rows), since every error is pushed on exactly once
    e = torch.linalg.solve_triangular(U.T, difference.T, upper=False).T
    assert loss == pytest.approx(float((e**2).sum()), rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_beats_round_to_nearest(scheme: Scheme, seed: int) -> None:
    W, H = problem(32, 256, seed)
    gptq, rtn = quantize_gptq(W, H, scheme)[0], quantize_rtn(W, scheme)
    assert relative_error(W, gptq, scheme, H) < 0.5 * relative_error(W, rtn, scheme, H)


def test_rows_do_not_see_each_other() -> None:
    """Linears that share an input may be stacked: each row is a problem of its own."""
    W, H = problem(48, 128)
    whole, alone = quantize_gptq(W, H, Scheme(4, 64))[0], quantize_gptq(W[:16], H, Scheme(4, 64))[0]
    assert (whole.codes[:16] == alone.codes).float().mean() > 0.999  # matrix products may round differently
    assert torch.equal(whole.scales[:16], alone.scales)


def test_without_correlations_it_is_rounding_on_the_searched_grid() -> None:
    W, _ = problem(8, 128)
    H = torch.diag(torch.rand(128) + 0.1)
    q, _ = quantize_gptq(W, H, Scheme(4, 32))
    step = q.scales.repeat_interleave(32, dim=1)
    inside = (q.codes > 0) & (q.codes < 15)
    assert ((W - dequantize(q, Scheme(4, 32))).abs() <= 0.5001 * step)[inside].all()


def test_dead_columns_are_rounded_not_destroyed() -> None:
    W, H = problem(8, 128)
    H[5], H[:, 5] = 0, 0
    q, _ = quantize_gptq(W, H, Scheme(4, 32))
    assert torch.allclose(dequantize(q, Scheme(4, 32))[:, 5], W[:, 5], atol=float(q.scales.max()) * 2)
    assert relative_error(W, q, Scheme(4, 32), H) < relative_error(W, quantize_rtn(W, Scheme(4, 32)), Scheme(4, 32), H)


def test_no_activation_at_all_still_quantizes() -> None:
    W, _ = problem(4, 64)
    q, factor = quantize_gptq(W, torch.zeros(64, 64), Scheme(4, 32))
    assert factor.rung == "no activation"
    assert (W - dequantize(q, Scheme(4, 32))).abs().mean() < 0.2 * W.abs().mean()


def test_same_input_same_bytes() -> None:
    W, H = problem(32, 256)
    first, second = quantize_gptq(W, H, Scheme())[0], quantize_gptq(W.clone(), H.clone(), Scheme())[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
