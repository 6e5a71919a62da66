"""The blocks of GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) that hold our integers as they are.

A row is a sequence of blocks of 32 columns. In 4 bits, byte j of a block holds code j below and code j + 16 above.

    Q4_0   d fp16, 16 bytes            w = d (code - 8)
    Q4_1   d fp16, m fp16, 16 bytes    w = d code + m
    Q8_0   d fp16, 32 int8             w = d code

A group of more than 32 columns repeats its scale. Q4_1 stores m = -d z: of a scale with eight bits and a zero point
with four it keeps eleven, so that a weight can be off by up to 0.007 d; integers and zero points are still told
exactly. Codes of 3 bits are moved to the midpoint of 4.
"""

import torch
from torch import Tensor

from llmquant.formats.checks import stored_scales
from llmquant.scheme import Quantized, Scheme

BLOCK = 32  # columns
SIZES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # bytes of a block


def kind(scheme: Scheme) -> str:
    """The type of block that holds a scheme, a key of SIZES."""
    return "Q8_0" if scheme.bits == 8 else "Q4_0" if scheme.symmetric else "Q4_1"


def refuse(m: int, n: int, scheme: Scheme) -> str | None:
    """Why a linear of this shape cannot be held; None if it can."""
    if scheme.bits == 8 and not scheme.symmetric:
        return "its blocks of 8 bits have no zero point"
    return f"{n} columns are not a multiple of {BLOCK}" if n % BLOCK else None


def pack(name: str, q: Quantized, scheme: Scheme) -> Tensor:
    """uint8 [m, n / 32 * SIZES[kind(scheme)]].

    Raises:
        NumericsError: a scale is not exact in fp16.
    """
    m, n = q.codes.shape
    group = torch.arange(0, n, BLOCK) // scheme.width(n)  # of each block
    d = stored_scales(name, q.scales, torch.float16)[:, group]
    codes = q.codes.view(m, -1, BLOCK)
    if scheme.bits == 8:
        return torch.cat((_bytes(d), codes ^ 0x80), -1).flatten(1)  # the sign bit turned: code - 128 as int8
    shift = 8 - scheme.midpoint
    codes = codes + shift
    nibbles = codes[..., :16] | codes[..., 16:] << 4
    if scheme.symmetric:
        return torch.cat((_bytes(d), nibbles), -1).flatten(1)
    least = (-q.scales * (q.zeros.float() + shift)).half()[:, group]
    return torch.cat((_bytes(d), _bytes(least), nibbles), -1).flatten(1)


def unpack(blocks: Tensor, n: int, type: str) -> Quantized:
    """The integers of `pack` as int4 or int8 in groups of 32. Of Q4_1 those whose zero points are integers."""
    m, size = len(blocks), SIZES[type]
    parts = blocks.view(m, n // BLOCK, size)
    scales = _fp16(parts[..., :2])
    if type == "Q8_0":
        return Quantized(
            (parts[..., 2:] ^ 0x80).reshape(m, n), scales, torch.full(scales.shape, 128, dtype=torch.uint8)
        )
    nibbles = parts[..., size - 16 :]
    codes = torch.cat((nibbles & 15, nibbles >> 4), -1).reshape(m, n)
    if type == "Q4_0":
        return Quantized(codes, scales, torch.full(scales.shape, 8, dtype=torch.uint8))
    return Quantized(codes, scales, (-_fp16(parts[..., 2:4]) / scales).round().to(torch.uint8))


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order in which llama.cpp rotates them: the halves of each head alternate. [m, ...]"""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def halved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`: the order in which transformers rotates."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _bytes(values: Tensor) -> Tensor:
    """fp16 [m, blocks] as bytes [m, blocks, 2]."""
    return values.contiguous().view(torch.uint8).unflatten(-1, (-1, 2))


def _fp16(octets: Tensor) -> Tensor:
    """bytes [m, blocks, 2] as the numbers that they are, fp32 [m, blocks]."""
    return octets.contiguous().view(torch.float16).squeeze(-1).float()
