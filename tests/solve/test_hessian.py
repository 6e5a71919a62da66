"""The factor is the inverse's, and the ladder says which rung it stood on."""

import pytest
import torch

from llmquant.solve.hessian import DAMPING, Factor, inverse_factor


def random_inputs(k: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, n, generator=generator) @ torch.randn(n, n, generator=generator)


def natural(H: torch.Tensor) -> Factor:
    return inverse_factor(H, torch.arange(len(H)))


def test_factor_is_the_cholesky_factor_of_the_damped_inverse() -> None:
    X = random_inputs(400, 48).double()
    H = X.T @ X / 400
    factor = natural(H.float())
    damped = H + factor.damping * H.diagonal().mean() * torch.eye(48)
    U = factor.U.double()
    assert torch.equal(U, U.triu())
    inverse = torch.linalg.inv(damped)
    assert float((U.T @ U - inverse).abs().max() / inverse.abs().max()) < 1e-4
    assert (factor.rung, factor.damping) == ("fp32", DAMPING)


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
    factor = natural(X.T @ X / len(X))
    assert factor.rung in ("fp32", "fp64")
    assert torch.isfinite(factor.U).all()
    assert (factor.U.diagonal() > 0).all()


def test_indefinite_hessians_climb_and_say_so() -> None:
    X = random_inputs(400, 16)
    H = X.T @ X / 400
    slightly = H - 0.05 * H.diagonal().mean() * torch.eye(16)  # damping 0.01 is not enough, 0.1 is
    low = torch.linalg.eigvalsh(slightly)[0] / slightly.diagonal().mean()
    assert low < -DAMPING
    assert natural(slightly).damping > DAMPING
    hopeless = -H
    hopeless.diagonal().copy_(H.diagonal())  # diagonal dominance lost in the wrong direction
    factor = natural(hopeless - 40 * (torch.ones(16, 16) - torch.eye(16)) * H.diagonal().mean())
    assert factor.rung == "diagonal"
    assert torch.isfinite(factor.U).all()


def test_nothing_seen_gives_the_identity() -> None:
    factor = natural(torch.zeros(6, 6))
    assert factor.rung == "no activation"
    assert torch.equal(factor.U, torch.eye(6))


def test_the_order_is_that_of_the_factor() -> None:
    X = random_inputs(400, 12)
    H, order = X.T @ X / 400, torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(inverse_factor(H, order).U, natural(H[order][:, order]).U)


def test_more_damping_where_it_is_asked_for() -> None:
    X = random_inputs(400, 12)
    assert inverse_factor(X.T @ X, torch.arange(12), damping=0.05).damping == 0.05
