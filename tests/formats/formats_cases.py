"""Quantized weights for the tests of layouts: every code occurs, every scale is exact in fp16 and bf16."""

import torch

from llmquant.scheme import BITS, Quantized, Scheme

SCHEMES = [Scheme(bits, g, sym) for bits in BITS for g in (32, 64, 128, -1) for sym in (True, False)]


def example() -> Quantized:
    """The worked example of the layouts' documentation: codes (m + 2n) mod 16, zero points 3 .. 10, one group."""
    codes = (torch.arange(8)[:, None] + 2 * torch.arange(8)) % 16
    zeros = torch.arange(3, 11)[:, None]
    return Quantized(codes.to(torch.uint8), torch.ones(8, 1), zeros.to(torch.uint8))


def quantized(scheme: Scheme, m: int = 16, n: int = 256, lowest_zero: int = 0) -> Quantized:
    """Codes that run through every value in every row of 256; zero points likewise, from `lowest_zero` on."""
    codes = (torch.arange(m)[:, None] * 7 + torch.arange(n)) % (scheme.max_code + 1)
    shape = (m, scheme.groups(n))
    places = torch.arange(m * shape[1]).reshape(shape)
    zeros = lowest_zero + places % (scheme.max_code + 1 - lowest_zero)
    if scheme.symmetric:
        zeros = torch.full(shape, scheme.midpoint)
    scales = (128 + places % 128) * 2.0**-14  # eight significant bits
    return Quantized(codes.to(torch.uint8), scales, zeros.to(torch.uint8))
