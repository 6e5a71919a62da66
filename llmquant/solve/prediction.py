"""What rounding a linear would do to the model's predictions, from second moments of its inputs alone.

A small change E of a weight moves the output of token t by E x_t, and the model's predictions by

    KL = 1/2 mean_t (g_t . E x_t)^2

nats on the mean, to second order, where g_t is the gradient at that output as `calibration.round_trip` draws it:
E g g^T is the Fisher information. Its entries between different outputs, and between different tokens, are left out,
and what remains is taken for a product of a weight w_t of each token and a weight b_r of each row:

    KL = 1/2 sum_r b_r E_r F E_r^T,   F = mean_t w_t x_t x_t^T,   w_t = sum_r g_tr^2,   b_r = sum_t g_tr^2 / sum_t w_t

The tokens of F are not those of H, which the solver fits: what it fits of them alone would look like a gain.
So the scheme of a linear is judged by the Gram form, tr(E H E^T), without a forward pass of its own.
(K-FAC, Martens and Grosse, arXiv 1503.05671, with a diagonal factor on the side of the outputs.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.scheme import Scheme, dequantize
from llmquant.solve.awq import sampled
from llmquant.solve.methods import METHODS, Choices, Problem, factored_gptq
from llmquant.solve.moments import Moments, relative_error
from llmquant.solve.outliers import Channels
from llmquant.solve.rtn import quantize_rtn

TRIAL_ROWS = 256  # of each linear, on which schemes are tried: rows are rounded independently


class Sensor:
    """Running sums over the tokens of linears that share an input; m is that of all of them together."""

    def __init__(self, m: int, n: int, device: torch.device | str = "cpu") -> None:
        self.inputs = Moments(n, device)  # as the solver sees them
        self._weighted = Moments(n, device)
        self._rows = torch.zeros(m, dtype=torch.float64, device=device)
        self.channels = Channels(n, device)

    def fit(self, x: Tensor, size: Tensor | None = None) -> None:
        """Add tokens for the solver to see: inputs [k, n], and sizes [k] to divide them by."""
        self.inputs.update(x if size is None else x / size.to(x.dtype).unsqueeze(1))
        self.channels.update(x)

    def judge(self, x: Tensor, gradient: Tensor) -> None:
        """Add tokens to judge by: inputs [k, n], gradients of the outputs [k, m]."""
        squares = gradient.float().square()
        self._weighted.update(x * squares.sum(1, keepdim=True).sqrt().to(x.dtype))
        self._rows += squares.sum(0)

    def curvature(self, name: str) -> tuple[Tensor, Tensor]:
        """F fp32 [n, n] and b fp32 [m]. NumericsError as of `Moments.H`; `name` is the linear."""
        total = self._rows.sum().clamp(min=torch.finfo(torch.float32).tiny)
        return self._weighted.H(name), (self._rows / total).float()


class Loss(NamedTuple):
    """Of one linear by one scheme."""

    error: float  # ||X E^T||^2 / ||X W^T||^2, X as the solver sees it
    kl: float  # nats


@dataclass(frozen=True)
class Trial:
    """Linears that share an input, and what is known of it.

    Attributes:
        weights: by linear, fp32 [m_i, n].
        H, F: fp32 [n, n].
        b: fp32 [m] of all their rows together.
    """

    weights: dict[str, Tensor]
    H: Tensor
    F: Tensor
    b: Tensor

    def losses(self, schemes: Sequence[Scheme], choices: Choices, *, calibrated: bool) -> dict[Scheme, dict[str, Loss]]:
        """Each linear's loss by each scheme: by GPTQ, or without calibration by rounding to nearest."""
        rows = torch.cat([sampled(W, TRIAL_ROWS) for W in self.weights.values()])
        problems: dict[int, Problem] = {}  # by the width of a group: one factor serves for all bits
        found = {}
        for scheme in schemes:
            width = scheme.width(rows.shape[1])
            problem = problems.setdefault(width, Problem(rows, scheme, choices, self.H))
            if calibrated:
                solution = factored_gptq(replace(problem, scheme=scheme), rows, problem.known, problem.factor)
            else:
                solution = METHODS["rtn"](replace(problem, scheme=scheme), rows)
            found[scheme] = self._by_linear(rows, rows - solution.weight(scheme))
        return found

    def granularities(self, bits: int, *, symmetric: bool) -> dict[str, dict[str, float]]:
        """Each linear's error rounded to nearest with one scale for all of it, for each row, and for each group."""
        found = {}
        for name, whole in self.weights.items():
            W = sampled(whole, TRIAL_ROWS)
            once = Scheme(bits, -1, symmetric)
            errors = {"per-tensor": dequantize(quantize_rtn(W.reshape(1, -1), once), once).view_as(W)}
            for scheme in [once, *(Scheme(bits, g, symmetric) for g in (128, 64, 32) if W.shape[1] % g == 0)]:
                label = "per-channel" if scheme.group_size == -1 else f"g{scheme.group_size}"
                errors[label] = dequantize(quantize_rtn(W, scheme), scheme)
            found[name] = {label: relative_error(W, Q, self.H) for label, Q in errors.items()}
        return found

    def _by_linear(self, rows: Tensor, E: Tensor) -> dict[str, Loss]:
        """Losses from the errors of sampled rows: the mean over them stands for the rest, weighted by b."""
        weighted = ((E @ self.F) * E).sum(1)
        plain, energy = ((E @ self.H) * E).sum(1), ((rows @ self.H) * rows).sum(1)
        found, start, first = {}, 0, 0
        for name, W in self.weights.items():
            b = self.b[first : first + len(W)]
            own = sampled(b.unsqueeze(1), TRIAL_ROWS).squeeze(1)
            part = slice(start, start + len(own))
            mean = float((own * weighted[part]).sum() / own.sum().clamp(min=torch.finfo(torch.float32).tiny))
            error = float(plain[part].sum() / energy[part].sum().clamp(min=torch.finfo(torch.float32).tiny))
            found[name] = Loss(error, 0.5 * float(b.sum()) * mean)
            start, first = start + len(own), first + len(W)
        return found
