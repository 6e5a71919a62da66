"""The factor is the inverse's, masked tokens do not exist, and the ladder says which rung it stood on."""

import pytest
import torch

from llmquant.errors import NumericsError
from llmquant.solve.hessian import DAMPING, Hessian, inverse_factor


def random_inputs(k: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, n, generator=generator) @ torch.randn(n, n, generator=generator)


def test_factor_is_the_cholesky_factor_of_the_damped_inverse() -> None:
    X = random_inputs(400, 48).double()
    H = X.T @ X / 400
    factor = inverse_factor(H.float())
    damped = H + factor.damping * H.diagonal().mean() * torch.eye(48)
    U = factor.U.double()
    assert torch.equal(U, U.triu())
    inverse = torch.linalg.inv(damped)
    assert float((U.T @ U - inverse).abs().max() / inverse.abs().max()) < 1e-4
    assert (factor.rung, factor.damping) == ("fp32", DAMPING[0])


def test_masked_tokens_contribute_not_a_single_bit() -> None:
    x = random_inputs(20, 8).reshape(2, 10, 8)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    with_padding, without = Hessian(8), Hessian(8)
    poisoned = x.clone()
    poisoned[~mask] = float("nan")  # even NaN must not get through
    with_padding.update(poisoned, mask)
    without.update(x[mask])
    assert torch.equal(with_padding.mean("l"), without.mean("l"))
    assert with_padding.tokens == 16


def test_mean_is_the_second_moment() -> None:
    X = random_inputs(64, 8)
    hessian = Hessian(8)
    hessian.update(X[:40])
    hessian.update(X[40:].reshape(2, 12, 8))
    assert torch.allclose(hessian.mean("l"), X.T @ X / 64, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_activations_are_named(poison: float) -> None:
    hessian = Hessian(4)
    x = torch.ones(3, 4)
    x[1, 2] = poison
    hessian.update(x)
    with pytest.raises(NumericsError, match=r"layers\.3\.mlp\.down_proj: NaN or Inf"):
        hessian.mean("layers.3.mlp.down_proj")


def test_no_token_is_an_error() -> None:
    hessian = Hessian(4)
    hessian.update(torch.ones(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(NumericsError, match="no calibration token"):
        hessian.mean("q_proj")


@pytest.mark.parametrize("case", ["few tokens", "duplicate columns", "dead columns", "wide range"])
def test_singular_but_positive_hessians_need_only_damping(case: str) -> None:
    X = random_inputs(400, 32)
    if case == "few tokens":
        X = X[:5]
    elif case == "duplicate columns":
        X[:, 1] = X[:, 0]
    elif case == "dead columns":
        X[:, 4:9] = 0
    else:
        X *= torch.logspace(-6, 6, 32)
    factor = inverse_factor(X.T @ X / len(X))
    assert factor.rung in ("fp32", "fp64")
    assert torch.isfinite(factor.U).all()
    assert (factor.U.diagonal() > 0).all()


def test_indefinite_hessians_climb_and_say_so() -> None:
    X = random_inputs(400, 16)
    H = X.T @ X / 400
    slightly = H - 0.05 * H.diagonal().mean() * torch.eye(16)  # damping 0.01 is not enough, 0.1 is
    low = torch.linalg.eigvalsh(slightly)[0] / slightly.diagonal().mean()
    assert low < -DAMPING[0]
    assert inverse_factor(slightly).damping > DAMPING[0]
    hopeless = -H
    hopeless.diagonal().copy_(H.diagonal())  # diagonal dominance lost in the wrong direction
    factor = inverse_factor(hopeless - 40 * (torch.ones(16, 16) - torch.eye(16)) * H.diagonal().mean())
    assert factor.rung == "diagonal"
    assert torch.isfinite(factor.U).all()


def test_nothing_seen_gives_the_identity() -> None:
    factor = inverse_factor(torch.zeros(6, 6))
    assert factor.rung == "no activation"
    assert torch.equal(factor.U, torch.eye(6))
