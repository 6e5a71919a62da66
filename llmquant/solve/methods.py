"""The methods by name: each takes rows of one stacked problem to their integers; and which of them is best."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.scheme import Quantized, Scheme, dequantize
from llmquant.solve.awq import SAMPLED_ROWS, Loss, gram_loss, sampled, search_scales
from llmquant.solve.columns import search_columns
from llmquant.solve.gptq import ORDERS, corrected, quantize_gptq
from llmquant.solve.grid import encode
from llmquant.solve.hessian import DAMPING, Factor, inverse_factor
from llmquant.solve.refine import refine
from llmquant.solve.rtn import quantize_rtn

TRIAL_ROWS = 256  # of the stacked weight, on which the candidates are compared


@dataclass(frozen=True)
class Choices:
    """What a solver is told. The fields are those of the recipe's `solver`."""

    order: str = "group"  # of GPTQ's columns: "group" or "static"
    weight: str = "diagonal"  # of grids chosen before the first column: "diagonal" (of H) or "pivot" (1 / U_jj^2)
    damping: float = DAMPING
    shrinkage: float = 0.0  # of H towards its diagonal
    correction: float = 0.0  # alpha: how far to aim at the output of the original model
    refine: int = 0  # passes of scale refit and coordinate descent


@dataclass(frozen=True)
class Problem:
    """Linears that share an input, stacked: W fp32 [m, n].

    Attributes:
        H, D: moments of the input as in `moments.py`, fp32 [n, n]; None where nothing is known or compared.
        settle: from wanted column scales to those that can be folded; None where nothing can.
        awq_loss: the loss that AWQ's scales are chosen by; None for the Gram form.
    """

    W: Tensor
    scheme: Scheme
    choices: Choices = field(default_factory=Choices)
    H: Tensor | None = None
    D: Tensor | None = None
    settle: Callable[[Tensor], Tensor] | None = None
    awq_loss: Loss | None = None

    @cached_property
    def known(self) -> Tensor:
        """H as the solvers are to see it."""
        if self.H is None:
            raise ValueError("this method needs a Hessian")
        return shrunk(self.H, self.choices.shrinkage)

    @cached_property
    def factor(self) -> Factor:
        return factorize(self.known, self.scheme, self.choices)

    @cached_property
    def scaled(self) -> tuple[Tensor, Factor]:
        """H of the input divided by AWQ's scales, S^-1 H S^-1, and its factor; without scales, those of H."""
        if self.scales is None:
            return self.known, self.factor
        H = self.known / self.scales.unsqueeze(1) / self.scales
        return H, factorize(H, self.scheme, self.choices)

    @cached_property
    def target(self) -> Tensor:
        """The weight to aim at: W, or W* where the original model's inputs are known."""
        if self.D is None or self.choices.correction == 0.0:
            return self.W
        return corrected(self.W, self.D, self.factor, self.choices.correction)

    @cached_property
    def scales(self) -> Tensor | None:
        """AWQ's column scales, fp32 [n]; None where none can be folded, or none helps."""
        if self.settle is None:
            return None
        W = self.target if self.awq_loss else sampled(self.target, SAMPLED_ROWS)
        loss = self.awq_loss or gram_loss(W, self.known)
        s = search_scales(W, self.known, self.scheme, self.settle, loss)
        return None if bool((s == 1.0).all()) else s


class Solution(NamedTuple):
    """Integers for W scaled by `fold`, and how they were come by."""

    quantized: Quantized
    method: str
    fold: Tensor | None = None  # fp32 [n]: the input has to be divided by it
    damping: float = 0.0  # lambda / mean(diag H)
    rung: str = "none"  # of the damping ladder; "none" where no Hessian is inverted

    def weight(self, scheme: Scheme) -> Tensor:
        """What takes the place of W, fp32 [m, n]."""
        W = dequantize(self.quantized, scheme)
        return W if self.fold is None else W.div_(self.fold)


def shrunk(H: Tensor, shrinkage: float) -> Tensor:
    """H brought nearer to its diagonal, (1 - shrinkage) H + shrinkage diag(H), divided by (1 - shrinkage).

    The correlations of a finite text are partly its own; an estimate between them and none at all errs less on another
    text (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices, 2004). No rounding
    depends on the size of H, but the correction does: with smaller correlations than D has, it would overshoot.
    """
    return H + torch.diag(H.diagonal() * (shrinkage / (1 - shrinkage)))


def factorize(H: Tensor, scheme: Scheme, choices: Choices) -> Factor:
    order = ORDERS[choices.order](H.diagonal(), scheme.width(len(H)))
    return inverse_factor(H, order, grouped=choices.order == "group", damping=choices.damping)


def rtn(problem: Problem, W: Tensor) -> Solution:
    return Solution(quantize_rtn(W, problem.scheme), "rtn")


def awq(problem: Problem, W: Tensor) -> Solution:
    """Scaled columns, each group's range clipped by the weighted search, and round to nearest."""
    s, H = problem.scales, problem.known
    weight = H.diagonal() if s is None else H.diagonal() / s.square()
    W = W if s is None else W * s
    scales, zeros = search_columns(
        W.T.contiguous(), floored(weight, DAMPING), problem.scheme.width(len(H)), problem.scheme
    )
    grids = scales.T.contiguous(), zeros.T.to(torch.uint8).contiguous()
    return Solution(encode(W, *grids, problem.scheme), "awq", s)


def gptq(problem: Problem, W: Tensor) -> Solution:
    return factored_gptq(problem, W, problem.known, problem.factor)


def awq_gptq(problem: Problem, W: Tensor) -> Solution:
    """GPTQ on the scaled columns."""
    s = problem.scales
    return factored_gptq(problem, W if s is None else W * s, *problem.scaled)._replace(method="awq+gptq", fold=s)


def factored_gptq(problem: Problem, W: Tensor, H: Tensor, factor: Factor) -> Solution:
    """GPTQ with the factor of H at hand: that of the problem, or of another whose groups are as wide."""
    if problem.choices.weight == "pivot":
        weight = torch.empty_like(H.diagonal()).index_copy_(0, factor.order, factor.U.diagonal().square().reciprocal())
    else:
        weight = floored(H.diagonal(), factor.damping)
    q = quantize_gptq(W, factor, weight, problem.scheme)
    q = refine(W, H, q, problem.scheme, problem.choices.refine)
    return Solution(q, "gptq", damping=factor.damping, rung=factor.rung)


METHODS = {"rtn": rtn, "awq": awq, "gptq": gptq, "awq+gptq": awq_gptq}


def solve(problem: Problem, method: str) -> Solution:
    return METHODS[method](problem, problem.target)


def compare(problem: Problem, x: Tensor, original: Tensor) -> dict[str, float]:
    """The output error of each candidate on tokens that the problem's moments do not contain.

    Rows are independent, so a sample of them is enough to judge by.

    Args:
        x, original: the tokens X^ and X, [k, n] each, in the dtype of the activations.
    """
    candidates = ["gptq", "awq"] if problem.scales is None else ["gptq", "awq", "awq+gptq"]
    rows, error = sampled(problem.target, TRIAL_ROWS), held_out_error(sampled(problem.W, TRIAL_ROWS), x, original)
    return {name: error(METHODS[name](problem, rows).weight(problem.scheme)) for name in candidates}


def held_out_error(W: Tensor, x: Tensor, original: Tensor) -> Callable[[Tensor], float]:
    """Of a weight Q: ||X W^T - X^ Q^T||^2 / ||X W^T||^2, what would be wrong at the outputs against their size.

    Written as (X - X^) W^T + X^ (W - Q)^T: nothing cancels, so the precision of the activations is enough for both.
    """
    shift = (original - x) @ W.T.to(x.dtype)
    size = float((original @ W.T.to(x.dtype)).float().square().sum())
    return lambda Q: float((shift + x @ (W - Q).T.to(x.dtype)).float().square().sum()) / max(size, 1e-30)


def floored(weight: Tensor, damping: float) -> Tensor:
    """A column that sees nothing still counts a little; where none sees anything, all count alike."""
    mean = float(weight.mean())
    return weight.clamp(min=0.0) + damping * mean if mean > 0.0 else torch.ones_like(weight)
