"""Round to nearest on the min-max grid: no calibration, the baseline of every table."""

from torch import Tensor

from llmquant.scheme import Quantized, Scheme
from llmquant.solve.grid import encode, minmax_grid


def quantize_rtn(W: Tensor, scheme: Scheme) -> Quantized:
    """Quantize `W` fp32 [m, n] without looking at any activation."""
    return encode(W, *minmax_grid(W, scheme), scheme)
