"""What the kernels compute, defined in plain torch. Every kernel is tested against it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llmquant.kernels.layout import Packed, unpack
from llmquant.scheme import Scheme, dequantize


def linear(x: Tensor, panels: Packed, bias: Tensor | None, m: int, scheme: Scheme) -> Tensor:
    """x [..., n] times the packed weight, plus bias [m]: [..., m] in the dtype of x, computed in fp32.

    y = x @ W.T + bias,    W[m, n] = scales[m, n // g] * (codes[m, n] - zeros[m, n // g])
    """
    weight = dequantize(unpack(panels, m, x.shape[-1], scheme), scheme)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention: [batch, queries, heads, v_width] in the dtype of q, computed in fp32.

    Args:
        q: [batch, heads, queries, width], the last positions of the keys.
        k, v: [batch, kv_heads, keys, width or v_width]; heads are a multiple of kv_heads, which share them in order.
    """
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    q = q.float().view(batch, kv_heads, heads // kv_heads, queries, -1)
    scores = (q * scale) @ k.float().unsqueeze(2).mT
    later = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
    out = scores.masked_fill(later, float("-inf")).softmax(-1) @ v.float().unsqueeze(2)
    return out.flatten(1, 2).transpose(1, 2).contiguous().to(v.dtype)
