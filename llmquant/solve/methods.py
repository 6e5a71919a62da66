"""The methods by name: each takes one stacked problem and says how well it went."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from llmquant.scheme import Quantized, Scheme, dequantize
from llmquant.solve.gptq import quantize_gptq, relative_error
from llmquant.solve.rtn import quantize_rtn


class Solution(NamedTuple):
    """The integers of one stacked problem, and how the Hessian was tamed to get them."""

    quantized: Quantized
    damping: float = 0.0  # lambda / mean(diag H)
    rung: str = "none"  # of the damping ladder; "none" where no Hessian is used


class Method(NamedTuple):
    """`solve` takes W fp32 [m, n], H fp32 [n, n] (None if not calibrated) and a scheme."""

    calibrated: bool
    solve: Callable[[Tensor, Tensor | None, Scheme], Solution]


def _rtn(W: Tensor, H: Tensor | None, scheme: Scheme) -> Solution:
    return Solution(quantize_rtn(W, scheme))


def _gptq(W: Tensor, H: Tensor | None, scheme: Scheme) -> Solution:
    if H is None:
        raise ValueError("GPTQ needs a Hessian")
    quantized, factor = quantize_gptq(W, H, scheme)
    return Solution(quantized, factor.damping, factor.rung)


METHODS = {"rtn": Method(False, _rtn), "gptq": Method(True, _gptq)}


def output_error(W: Tensor, q: Quantized, scheme: Scheme, H: Tensor | None) -> float:
    """Relative squared error of the output, or of the weight itself where no activation is known."""
    if H is not None:
        return relative_error(W, q, scheme, H)
    return float((W - dequantize(q, scheme)).square().sum() / W.square().sum().clamp(min=1e-30))
