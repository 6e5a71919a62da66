"""The inverse factor of a Hessian: U upper triangular with (H + lambda I)^-1 = U^T U.

(Frantar et al., GPTQ, arXiv 2210.17323.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01  # lambda as a fraction of mean(diag H), where nothing else is said
RUNGS = (1.0, 10.0, 100.0)  # and what it is multiplied by until the factorization succeeds
LEAF = 128  # rows of a triangle that is inverted by substitution; a larger one is halved first


@dataclass(frozen=True)
class Factor:
    """U of a Hessian with its columns in another order, and how it was come by.

    `rung` is "fp32", "fp64", "diagonal" or "no activation".
    """

    U: Tensor  # fp32 [n, n], upper triangular, (H + lambda I)^-1 = U^T U, rows and columns of H in `order`
    order: Tensor  # int64 [n]
    grouped: bool  # `order` leaves each group of columns together
    rung: str
    damping: float


def inverse_factor(H: Tensor, order: Tensor, *, grouped: bool = False, damping: float = DAMPING) -> Factor:
    """Factor the inverse of a damped Hessian, climbing a ladder until it succeeds.

    More damping in fp32, then float64, then the diagonal alone, which ignores correlations but is
    always positive. An all-zero H (nothing ever reached the linear) gives the identity. The rung is
    part of the result, so that a fallback is reported and never silent.
    """
    mean = float(H.diagonal().mean())
    if mean <= 0.0:
        return Factor(torch.eye(len(H), device=H.device), order, grouped, "no activation", 0.0)
    ordered = H[order][:, order]
    for dtype, rung in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        for amount in (damping * times for times in RUNGS):
            U = _reverse_cholesky_inverse(_damped(ordered.to(dtype), amount * mean))
            if U is not None:
                return Factor(U.float().contiguous(), order, grouped, rung, amount)
    diagonal = ordered.diagonal().clamp(min=0.0) + damping * mean
    return Factor(torch.diag(diagonal.rsqrt()), order, grouped, "diagonal", damping)


def _damped(H: Tensor, amount: float) -> Tensor:
    damped = H.clone()
    damped.diagonal().add_(amount)
    return damped


def _reverse_cholesky_inverse(H: Tensor) -> Tensor | None:
    """U = R^-1 where H = R R^T and R is upper triangular; None if H is not positive definite.

    R comes from the Cholesky factor of H with rows and columns reversed. One factorization and one
    triangular inverse; H^-1 itself, which would square the rounding, is never formed.
    """
    L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(info):
        return None
    U = torch.zeros_like(H)
    _invert_upper(L.flip(0, 1), U)
    return U if bool(torch.isfinite(U).all()) else None


def _invert_upper(R: Tensor, U: Tensor) -> None:
    """U = R^-1 by halves, [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]]: a third of the work of solving
    R U = I, nearly all of it in matrix products. `U` comes filled with zeros."""
    n = len(R)
    if n <= LEAF:
        U.copy_(torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True))
        return
    half = n // 2
    _invert_upper(R[:half, :half], U[:half, :half])
    _invert_upper(R[half:, half:], U[half:, half:])
    U[:half, half:] = (U[:half, :half] @ R[:half, half:] @ U[half:, half:]).neg_()
