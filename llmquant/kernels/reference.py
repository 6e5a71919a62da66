"""The definition of a product with a packed weight, in plain torch. Every kernel is tested against it.

    y = x @ W.T + bias,    W[m, n] = scales[m, n // g] * (codes[m, n] - zeros[m, n // g])

Packed codes are uint8 [m, ceil(n * bits / 8)], the low nibble first.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llmquant.scheme import Quantized, Scheme, dequantize


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [m, n], 0 .. 2**bits - 1, to bytes [m, ceil(n * bits / 8)]."""
    if bits == 8:
        return codes.contiguous()
    even = F.pad(codes, (0, codes.shape[1] % 2))
    return even[:, 0::2] | even[:, 1::2] << 4


def unpack_codes(packed: Tensor, n: int, bits: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 [m, n]."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :n]


def linear(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, scheme: Scheme
) -> Tensor:
    """x [..., n] times the weight, plus bias [m]: [..., m] in the dtype of x, computed in fp32.

    `scales` is fp32 [m, G]; `zeros` is uint8 [m, G], or None for the midpoint everywhere.
    """
    codes = unpack_codes(packed, x.shape[-1], scheme.bits)
    if zeros is None:
        zeros = torch.full_like(scales, scheme.midpoint, dtype=torch.uint8)
    weight = dequantize(Quantized(codes, scales, zeros), scheme)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)
