"""The bit order that all layouts share: codes in int32 words, the first code in the lowest bits.

A word of 4-bit codes c0 .. c7 is `c0 | c1 << 4 | ... | c7 << 28`. In the memory of a little-endian machine that is a
stream of bytes with the low nibble first, so words are made and read as views of bytes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

EIGHT_CODES = torch.arange(0, 24, 3)  # where 3-bit codes stand in three bytes
THREE_BYTES = torch.arange(0, 24, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] to int32 [..., ceil(n * bits / 32)], for 3, 4 or 8 bits; the last word is padded with zeros."""
    octets = F.pad(codes, (0, -codes.shape[-1] % 32))
    if bits == 3:  # eight codes are three bytes
        run = (octets.unflatten(-1, (-1, 8)).int() << EIGHT_CODES.to(codes.device)).sum(-1, keepdim=True)
        octets = (run >> THREE_BYTES.to(codes.device)).to(torch.uint8).flatten(-2)
    elif bits == 4:
        octets = octets[..., 0::2] | octets[..., 1::2] << 4
    count = words(codes.shape[-1], bits)
    return octets[..., : 4 * count].contiguous().flatten().view(torch.int32).reshape(*codes.shape[:-1], count)


def unpack(words: Tensor, bits: int, n: int) -> Tensor:
    """The first `n` codes, uint8 [..., n]: the inverse of `pack`."""
    octets = words.flatten().view(torch.uint8).reshape(*words.shape[:-1], 4 * words.shape[-1])
    if bits == 3:
        triples = F.pad(octets, (0, -octets.shape[-1] % 3)).unflatten(-1, (-1, 3)).int()
        run = (triples << THREE_BYTES.to(words.device)).sum(-1, keepdim=True)
        octets = (run >> EIGHT_CODES.to(words.device) & 7).to(torch.uint8).flatten(-2)
    elif bits == 4:
        octets = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    return octets[..., :n].contiguous()


def words(n: int, bits: int) -> int:
    """Words that hold `n` codes."""
    return -(-n * bits // 32)
