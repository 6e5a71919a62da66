"""Second moments of a linear's input, and their inverse factor.

Notation of the solvers: inputs X [k, n] over k tokens, H = X^T X / k [n, n], and U upper
triangular with (H + lambda I)^-1 = U^T U. (Frantar et al., GPTQ, arXiv 2210.17323.)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmquant.errors import NumericsError

DAMPING = (0.01, 0.1, 1.0)  # lambda as a fraction of mean(diag H), rung by rung


class Hessian:
    """Running sum of x^T x over the tokens that count, fp32 [n, n]."""

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(n, n, device=device)
        self.tokens = 0

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add tokens `x` [..., n]; `mask` [...] is False where a token is padding."""
        x = x.reshape(-1, x.shape[-1]).float()
        if mask is not None:
            x = x[mask.reshape(-1)]
        self.total.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def mean(self, name: str) -> Tensor:
        """H = X^T X / k.

        Raises:
            NumericsError: no token was seen, or an activation was NaN or Inf; `name` is the linear.
        """
        if not self.tokens:
            raise NumericsError(f"{name}: no calibration token reached its input")
        # A NaN or Inf in x puts one on the diagonal, so n numbers speak for n * n.
        if not torch.isfinite(self.total.diagonal()).all():
            raise NumericsError(f"{name}: NaN or Inf in its input activations; check the checkpoint and its dtype")
        return self.total / self.tokens


@dataclass(frozen=True)
class Factor:
    """U and how it was come by. `rung` is "fp32", "fp64", "diagonal" or "no activation"."""

    U: Tensor  # fp32 [n, n], upper triangular, (H + lambda I)^-1 = U^T U
    rung: str
    damping: float


def inverse_factor(H: Tensor) -> Factor:
    """Factor the inverse of a damped Hessian, climbing a ladder until it succeeds.

    More damping in fp32, then float64, then the diagonal alone, which ignores correlations but is
    always positive. An all-zero H (nothing ever reached the linear) gives the identity. The rung is
    part of the result, so that a fallback is reported and never silent.
    """
    n = H.shape[0]
    mean = float(H.diagonal().mean())
    if mean <= 0.0:
        return Factor(torch.eye(n, device=H.device), "no activation", 0.0)
    for dtype, rung in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        for damping in DAMPING:
            U = _reverse_cholesky_inverse(_damped(H.to(dtype), damping * mean))
            if U is not None:
                return Factor(U.float(), rung, damping)
    diagonal = H.diagonal().clamp(min=0.0) + DAMPING[0] * mean
    return Factor(torch.diag(diagonal.rsqrt()), "diagonal", DAMPING[0])


def _damped(H: Tensor, amount: float) -> Tensor:
    damped = H.clone()
    damped.diagonal().add_(amount)
    return damped


def _reverse_cholesky_inverse(H: Tensor) -> Tensor | None:
    """U = R^-1 where H = R R^T and R is upper triangular; None if H is not positive definite.

    R comes from the Cholesky factor of H with rows and columns reversed. One factorization and one
    triangular solve; H^-1 itself, which would square the rounding, is never formed.
    """
    L, info = torch.linalg.cholesky_ex(H.flip(0, 1))
    if int(info):
        return None
    R = L.flip(0, 1)
    U = torch.linalg.solve_triangular(R, torch.eye(H.shape[0], dtype=H.dtype, device=H.device), upper=True)
    return U if bool(torch.isfinite(U).all()) else None
