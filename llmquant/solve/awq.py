"""AWQ: columns that carry large activations are scaled up before rounding, and the scale is undone before the linear.

(Lin et al., arXiv 2306.00978.) Scales are powers of two: what is folded into the norm or the linear in front is then
exact in every float format, and the model as a whole is unchanged, bit by bit, until it is rounded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmquant.scheme import Scheme, dequantize
from llmquant.solve.moments import energy
from llmquant.solve.rtn import quantize_rtn

POWERS = torch.linspace(0.0, 1.0, 6)
WORTH_IT = 0.8  # of the loss without scales: GPTQ makes up for most of a smaller gain by itself
SAMPLED_ROWS = 64  # of the stacked weight, on which scales are compared: all rows share them

Loss = Callable[[Tensor], float]  # of the weight that takes the place of W, [m, n]


def search_scales(W: Tensor, H: Tensor, scheme: Scheme, settle: Callable[[Tensor], Tensor], loss: Loss) -> Tensor:
    """The column scales s, fp32 [n], under which round-to-nearest of W s, divided by s, loses least.

    Tried are s = x^a and s = x^a / w^(1 - a) for a in 0 .. 1, with x the root mean square of each input and w the mean
    of |W| over each group's largest; a = 0 of the first is no scale at all. `settle` gives the scales that can be
    folded, from those that are wanted.
    """
    activations = H.diagonal().clamp(min=0.0).sqrt()
    groups = W.view(len(W), -1, scheme.width(W.shape[1]))
    magnitudes = (groups.abs() / groups.abs().amax(-1, keepdim=True).clamp(min=1e-12)).mean(0).reshape(-1)
    wanted = [powers_of_two(activations**a) for a in POWERS]
    wanted += [powers_of_two(activations**a / magnitudes.clamp(min=1e-6) ** (1 - a)) for a in POWERS]
    tried = torch.unique(torch.stack([settle(s) for s in wanted]), dim=0)
    ones = torch.ones_like(activations)
    losses = torch.tensor([loss(rounded(W, s, scheme)) for s in tried])
    least = losses.argmin()
    return tried[least] if losses[least] < WORTH_IT * loss(rounded(W, ones, scheme)) else ones


def sampled(W: Tensor, rows: int) -> Tensor:
    """At most so many rows, spread over the weight."""
    return W[:: -(-len(W) // rows)]


def gram_loss(W: Tensor, H: Tensor) -> Loss:
    """||X (W - Q)^T||^2 = tr(E H E^T): no forward pass."""
    return lambda Q: energy(W - Q, H)


def rounded(W: Tensor, s: Tensor, scheme: Scheme) -> Tensor:
    """What stands in the place of W after rounding W s to nearest, fp32 [m, n]."""
    return dequantize(quantize_rtn(W * s, scheme), scheme).div_(s)


def powers_of_two(s: Tensor) -> Tensor:
    """Positive scales to powers of two around one, fp32 [n]; a column that sees nothing counts as the least of all."""
    least = s[s > 0].amin() if bool((s > 0).any()) else s.new_ones(())
    exponents = s.clamp(min=least).log2()
    return torch.exp2(torch.round(exponents - (exponents.amax() + exponents.amin()) / 2))
