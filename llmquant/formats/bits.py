"""The bit order that all layouts share: codes in int32 words, the first code in the lowest bits.

A word of 4-bit codes c0 .. c7 is `c0 | c1 << 4 | ... | c7 << 28`. In the memory of a little-endian machine that is a
stream of bytes with the low nibble first, so words are made and read as views of bytes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] to int32 [..., ceil(n * bits / 32)], for 4 or 8 bits; the last word is padded with zeros."""
    octets = F.pad(codes, (0, -codes.shape[-1] % (32 // bits)))
    if bits == 4:
        octets = octets[..., 0::2] | octets[..., 1::2] << 4
    return octets.flatten().view(torch.int32).reshape(*codes.shape[:-1], words(codes.shape[-1], bits))


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes, uint8 [..., n]: the inverse of `pack`."""
    octets = words.flatten().view(torch.uint8).reshape(*words.shape[:-1], 4 * words.shape[-1])
    if bits == 4:
        octets = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    return octets[..., :n].contiguous()


def words(n: int, bits: int) -> int:
    """Words that hold `n` codes."""
    return -(-n * bits // 32)
