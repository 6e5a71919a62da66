"""GPTQ against its own definition, written the slow way, and against round-to-nearest."""

import pytest
import torch

from llmquant.scheme import Quantized, Scheme, dequantize
from llmquant.solve.gptq import ORDERS, corrected, group_order, quantize_gptq
from llmquant.solve.hessian import Factor, inverse_factor
from llmquant.solve.moments import relative_error
from llmquant.solve.rtn import quantize_rtn

SCHEMES = [Scheme(4, g, symmetric) for g in (32, 64, 128, -1) for symmetric in (True, False)]


def problem(m: int, n: int, seed: int = 0, k: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs of uneven size, as behind a norm: (W, H)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(n) + torch.randn(n, n, generator=generator) * 0.15
    X = torch.randn(k, n, generator=generator) @ mix * torch.exp(torch.randn(n, generator=generator))
    return torch.randn(m, n, generator=generator) * 0.05, X.T @ X / k


def solve(W: torch.Tensor, H: torch.Tensor, scheme: Scheme, order: str = "group") -> tuple[Quantized, Factor]:
    columns = ORDERS[order](H.diagonal(), scheme.width(W.shape[1]))
    factor = inverse_factor(H, columns, grouped=order == "group")
    weight = H.diagonal() + factor.damping * H.diagonal().mean()
    return quantize_gptq(W, factor, weight, scheme), factor


def column_by_column(
    W: torch.Tensor, H: torch.Tensor, q: Quantized, factor: Factor, scheme: Scheme
) -> tuple[torch.Tensor, float]:
    """The algorithm as the paper states it, in float64: after each column the rest is re-optimised exactly.

    w_rest += (w_j - q_j) H_j,rest H_rest,rest^-1: no Cholesky factor, no blocks. On the grids of `q`.
    Returns the codes and the loss.
    """
    n = W.shape[1]
    damped = (H + factor.damping * H.diagonal().mean() * torch.eye(n)).double()
    rest, codes = W.double().clone(), torch.zeros_like(W, dtype=torch.uint8)
    for i, j in enumerate(factor.order.tolist()):
        s, z = q.scales[:, j // scheme.width(n)].double(), q.zeros[:, j // scheme.width(n)].double()
        code = (torch.round(rest[:, j] / s) + z).clamp(0, scheme.max_code)
        codes[:, j] = code.to(torch.uint8)
        error = rest[:, j] - (code - z) * s
        later = factor.order[i + 1 :]
        if len(later):
            step = torch.linalg.solve(damped[later][:, later], damped[later, j])
            rest[:, later] += torch.outer(error, step)
    difference = W.double() - dequantize(q._replace(codes=codes), scheme).double()
    return codes, float(((difference @ damped) * difference).sum())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_the_definition(scheme: Scheme, order: str) -> None:
    W, H = problem(12, 256)
    q, factor = solve(W, H, scheme, order)
    assert factor.rung == "fp32"
    # fp32 against float64: a weight on the edge between two codes may fall to the other side, hardly ever
    assert (q.codes == column_by_column(W, H, q, factor, scheme)[0]).float().mean() > 0.995


def test_group_order_keeps_groups_together_and_starts_with_the_most_important() -> None:
    importance = torch.rand(256, generator=torch.Generator().manual_seed(0))
    order = group_order(importance, 32)
    groups = (order // 32).view(8, 32)
    assert sorted(order.tolist()) == list(range(256))
    assert (groups == groups[:, :1]).all()
    ordered = importance[order].view(8, 32)
    assert (ordered.diff(dim=1) <= 0).all()
    assert (ordered[:, 0].diff() <= 0).all()


def test_loss_is_the_sum_of_the_normalised_errors() -> None:
    """tr(D H D^T) = sum of e^2: what GPTQ adds up column by column is the layer's true output error."""
    W, H = problem(6, 64)
    scheme = Scheme(4, 32)
    q, factor = solve(W, H, scheme)
    codes, loss = column_by_column(W, H, q, factor, scheme)
    U = factor.U.double()
    difference = (W.double() - dequantize(q._replace(codes=codes), scheme).double())[:, factor.order]
    # e U = D (as rows), since every error is pushed on exactly once
    e = torch.linalg.solve_triangular(U.T, difference.T, upper=False).T
    assert loss == pytest.approx(float((e**2).sum()), rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_beats_round_to_nearest(scheme: Scheme, seed: int) -> None:
    W, H = problem(32, 256, seed)
    gptq, rtn = solve(W, H, scheme)[0], quantize_rtn(W, scheme)
    assert relative_error(W, dequantize(gptq, scheme), H) < 0.5 * relative_error(W, dequantize(rtn, scheme), H)


def test_rows_do_not_see_each_other() -> None:
    """Linears that share an input may be stacked: each row is a problem of its own."""
    W, H = problem(48, 128)
    whole, alone = solve(W, H, Scheme(4, 64))[0], solve(W[:16], H, Scheme(4, 64))[0]
    assert (whole.codes[:16] == alone.codes).float().mean() > 0.999  # matrix products may round differently
    assert torch.equal(whole.scales[:16], alone.scales)


def test_without_correlations_it_is_rounding_on_the_searched_grid() -> None:
    W, _ = problem(8, 128)
    H = torch.diag(torch.rand(128) + 0.1)
    q, _ = solve(W, H, Scheme(4, 32))
    step = q.scales.abs().repeat_interleave(32, dim=1)
    inside = (q.codes > 0) & (q.codes < 15)
    assert ((W - dequantize(q, Scheme(4, 32))).abs() <= 0.5001 * step)[inside].all()


def test_dead_columns_are_rounded_not_destroyed() -> None:
    W, H = problem(8, 128)
    H[5], H[:, 5] = 0, 0
    scheme = Scheme(4, 32)
    q, _ = solve(W, H, scheme)
    rtn = dequantize(quantize_rtn(W, scheme), scheme)
    assert torch.allclose(dequantize(q, scheme)[:, 5], W[:, 5], atol=float(q.scales.abs().max()) * 2)
    assert relative_error(W, dequantize(q, scheme), H) < relative_error(W, rtn, H)


def test_no_activation_at_all_still_quantizes() -> None:
    W, _ = problem(4, 64)
    q, factor = solve(W, torch.zeros(64, 64), Scheme(4, 32))
    assert factor.rung == "no activation"
    assert (W - dequantize(q, Scheme(4, 32))).abs().mean() < 0.2 * W.abs().mean()


def test_same_input_same_bytes() -> None:
    W, H = problem(32, 256)
    first, second = solve(W, H, Scheme())[0], solve(W.clone(), H.clone(), Scheme())[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_correction_is_the_least_squares_answer() -> None:
    """At alpha = 1 and hardly any damping: the W* that best maps the quantized inputs to the full-precision outputs."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 32, generator=generator).double()
    noisy = X + 0.2 * torch.randn(400, 32, generator=generator).double()
    W = torch.randn(6, 32, generator=generator).double()
    H, D = noisy.T @ noisy / 400, (X - noisy).T @ noisy / 400
    factor = inverse_factor(H.float(), group_order(H.diagonal(), 32), damping=1e-7)
    expected = torch.linalg.lstsq(noisy, X @ W.T).solution.T
    assert torch.allclose(corrected(W.float(), D.float(), factor, 1.0).double(), expected, atol=1e-4)
    half = corrected(W.float(), D.float(), factor, 0.5).double()
    assert torch.allclose(half, (W + expected) / 2, atol=1e-4)
    assert torch.equal(corrected(W.float(), D.float(), factor, 0.0), W.float())
