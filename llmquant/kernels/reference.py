"""The definition of a product with a packed weight, in plain torch. Every kernel is tested against it.

y = x @ W.T + bias,    W[m, n] = scales[m, n // g] * (codes[m, n] - zeros[m, n // g])
"""

from torch import Tensor
from torch.nn import functional as F

from llmquant.kernels.layout import Panels, unpack
from llmquant.scheme import Scheme, dequantize


def linear(x: Tensor, panels: Panels, bias: Tensor | None, m: int, scheme: Scheme) -> Tensor:
    """x [..., n] times the weight, plus bias [m]: [..., m] in the dtype of x, computed in fp32."""
    weight = dequantize(unpack(panels, m, x.shape[-1], scheme), scheme)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
