"""Products with packed weights in Triton: for GPUs where our CUDA library was not built.

A word of 32 bits holds the codes of as many blocks of 32 columns, one of each, so a block is had from the words as they
are loaded, by the same few bit operations for all of its columns, and is a product of its own. For few tokens, where
that is most of the work, two 4-bit codes at a time become numbers by being written into the mantissa of a power of two,
as in csrc/cuda/layout.h; what is too much by that is taken from the fp32 sum of a group, as often as its activations
add up to. Otherwise weights are the integers q - z, which every activation dtype holds exactly. Either way the scale of
a group is applied to its fp32 sum: a weight is never rounded. Sums have a fixed order, without atomics; a product that
is split along the columns leaves fp32 parts, which a second kernel adds from the first to the last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from llmquant.kernels import slabs
from llmquant.kernels.layout import Packed, exact_dtype
from llmquant.kernels.tuning import FEW, Config, choose, most_tokens
from llmquant.scheme import Quantized, Scheme

ROWS = 128  # out features are filled up to a multiple of it, so that no tile of them needs bounds
BLOCK = 32  # columns of one product, all of one group
SUMMED = 1024  # outputs of one program that adds parts
FILLED = 32  # rows of one program that dequantizes
FUSED = True  # a multiplication and an addition in one rounding


def step_of(scheme: Scheme) -> int:
    """Columns that a row of words, BLOCK of them, holds the codes of."""
    return 32 // scheme.bits * BLOCK


def shapes(m: int, n: int, scheme: Scheme) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the codes, the scales and the zeros."""
    rows, step = -(-m // ROWS) * ROWS, step_of(scheme)
    grid = scheme.groups(n), rows
    return (rows, -(-n // step) * step * scheme.bits // 8), grid, grid


def pack(q: Quantized, scheme: Scheme) -> Packed:
    """A quantized weight [m, n] of 4 or 8 bits, filled up to m' rows and to whole steps, n' columns.

    codes: uint8 [m', n' bits / 8]: words of 32 bits, little-endian. With 4 bits nibble i of word 32 c + j of a row has
        the code of column 256 c + 32 i + j; with 8 bits byte i has that of column 128 c + 32 i + j.
    scales: one of layout.KINDS [G, m'].
    zeros: uint8 [G, m'].
    """
    m, n = q.codes.shape
    below = -m % ROWS
    codes = F.pad(q.codes, (0, -n % step_of(scheme), 0, below))
    bytes_ = codes.view(len(codes), -1, 4, 8 // scheme.bits, BLOCK)
    if scheme.bits == 4:
        bytes_ = bytes_[:, :, :, :1] | bytes_[:, :, :, 1:] << 4
    words = bytes_.squeeze(3).transpose(2, 3)  # [m', steps, 32, 4 bytes]
    held = q.scales.to(exact_dtype(q.scales))
    scales, zeros = (F.pad(grid, (0, 0, 0, below)).T.contiguous() for grid in (held, q.zeros))
    return Packed(words.flatten(1), scales, None if scheme.symmetric else zeros)


def unpack(packed: Packed, m: int, n: int, scheme: Scheme) -> Quantized:
    """The inverse of `pack`."""
    bytes_ = packed.codes.view(len(packed.codes), -1, BLOCK, 4).transpose(2, 3)
    blocks = bytes_ if scheme.bits == 8 else torch.stack((bytes_ & 15, bytes_ >> 4), 3)
    scales = packed.scales.T[:m].float().contiguous()
    zeros = torch.full_like(scales, scheme.midpoint) if packed.zeros is None else packed.zeros.T[:m]
    return Quantized(blocks.flatten(1)[:m, :n].contiguous(), scales, zeros.to(torch.uint8).contiguous())


def linear(
    x: Tensor, packed: Packed, bias: Tensor | None, m: int, scheme: Scheme, config: Config | None = None
) -> Tensor:
    """As `reference.linear`: x [..., n], contiguous, of one of layout.KINDS, to [..., m] of the same."""
    n = x.shape[-1]
    tokens = x.numel() // n
    y = x.new_empty(*x.shape[:-1], m)
    if tokens == 0:
        return y
    if config is None and tokens > most_tokens(x.device):
        slabs.multiply(
            x.view(-1, n),
            lambda first, count: dequantize(packed, first, count, n, scheme, x.dtype),
            bias,
            y.view(-1, m),
        )
        return y
    tile, at_once, split, warps, stages = config or choose(x.device, m, n, tokens, step_of(scheme))
    whole = split == 1
    parts = y if whole else x.new_empty(split, tokens, m, dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _linear[(-(-m // tile), -(-tokens // at_once), split)](
            x,
            packed.codes.view(torch.int32),
            *packed[1:],
            bias if whole else None,
            parts,
            tokens,
            m,
            n,
            packed.codes.shape[0],
            **_constants(n, scheme),
            RAW=scheme.bits == 4 and at_once == FEW and x.dtype != torch.float32,
            TILE=tile,
            TOKENS=at_once,
            SPLIT=split,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=FUSED,
        )
        if not whole:
            _add[(-(-tokens * m // SUMMED),)](
                parts, bias, y, tokens * m, m, SPLIT=split, BLOCK=SUMMED, enable_fp_fusion=FUSED
            )
    return y


def dequantize(packed: Packed, first: int, count: int, n: int, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Rows `first` to `first + count` of the real weight: [count, n], rounded to `dtype`."""
    weight = torch.empty(count, n, dtype=dtype, device=packed.codes.device)
    with torch.cuda.device_of(weight):
        _dequantize[(-(-count // FILLED), -(-n // step_of(scheme)))](
            packed.codes.view(torch.int32),
            *packed[1:],
            weight,
            first,
            count,
            n,
            packed.codes.shape[0],
            **_constants(n, scheme),
            TILE=FILLED,
            enable_fp_fusion=FUSED,
        )
    return weight


def _constants(n: int, scheme: Scheme) -> dict[str, int]:
    """BLOCKS: those of a step that share a scale."""
    blocks = step_of(scheme) // BLOCK
    per_row = scheme.group_size == -1
    return {"BITS": scheme.bits, "BLOCKS": blocks if per_row else scheme.group_size // BLOCK, "PER_ROW": int(per_row)}


@triton.jit
def _linear(
    x,
    codes,
    scales,
    zeros,
    bias,
    y,
    tokens,
    m,
    n,
    height,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PER_ROW: tl.constexpr,
    RAW: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y [SPLIT, tokens, m], in fp32 where SPLIT > 1. The weight is the left operand: it goes from memory into registers
    and from there into the product."""
    COUNT: tl.constexpr = 32 // BITS  # blocks of a step
    dtype = x.dtype.element_ty
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    part, steps, column = tl.program_id(2), tl.cdiv(n, COUNT * 32), tl.arange(0, 32)
    groups = tl.cdiv(n, BLOCKS * 32)
    codes += row[:, None].to(tl.int64) * (steps * 32) + column[None, :]
    x += token[None, :].to(tl.int64) * n + column[:, None]
    asked = (token < tokens)[None, :]
    if RAW:
        ones = _ones(TILE, dtype)
    sums = tl.zeros((TILE, TOKENS), tl.float32)
    first = part * tl.cdiv(steps, SPLIT)
    for step in range(first, min(first + tl.cdiv(steps, SPLIT), steps)):
        word = tl.load(codes + step * 32)
        for block in tl.static_range(COUNT):
            here = (step * COUNT + block) * 32
            some = tl.load(x + here, mask=asked & (here + column < n)[:, None], other=0.0)
            if block % BLOCKS == 0:
                scale, zero = _grid(scales, zeros, row, here // (BLOCKS * 32), groups, height, BITS, PER_ROW)
                product = tl.zeros((TILE, TOKENS), tl.float32)
                excess = tl.zeros((TILE, TOKENS), tl.float32)
            if RAW:
                product = tl.dot(_raw(word, block, dtype), some, product)
                excess = tl.dot(ones, some, excess)
            else:
                W = _integer(word, block, BITS, zero).to(dtype)
                product = tl.dot(W, some, product, input_precision="ieee")
            if (block + 1) % BLOCKS == 0:
                if RAW:
                    product -= excess * (_origin(dtype) + zero)
                sums += product * scale
    if bias is not None:
        sums += tl.load(bias + row, mask=row < m, other=0.0).to(tl.float32)[:, None]
    y += part.to(tl.int64) * tokens * m + token[None, :].to(tl.int64) * m + row[:, None]
    tl.store(y, sums.to(y.dtype.element_ty), mask=asked & (row < m)[:, None])


@triton.jit
def _add(parts, bias, y, size, m, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of parts [SPLIT, size], from the first to the last, and of the bias of each of its rows."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.load(parts + place, mask=inside)
    for _ in range(1, SPLIT):
        parts += size
        total += tl.load(parts + place, mask=inside)
    if bias is not None:
        total += tl.load(bias + place % m, mask=inside).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize(
    codes,
    scales,
    zeros,
    weight,
    first,
    count,
    n,
    height,
    BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PER_ROW: tl.constexpr,
    TILE: tl.constexpr,
):
    COUNT: tl.constexpr = 32 // BITS
    dtype = weight.dtype.element_ty
    step, steps, column = tl.program_id(1), tl.cdiv(n, COUNT * 32), tl.arange(0, 32)
    groups = tl.cdiv(n, BLOCKS * 32)
    local = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, inside = first + local, (local < count)[:, None]
    word = tl.load(codes + row[:, None].to(tl.int64) * (steps * 32) + step * 32 + column[None, :], mask=inside)
    weight += local[:, None].to(tl.int64) * n + column[None, :]
    for block in tl.static_range(COUNT):
        here = (step * COUNT + block) * 32
        if block % BLOCKS == 0:
            scale, zero = _grid(scales, zeros, row, here // (BLOCKS * 32), groups, height, BITS, PER_ROW)
        value = _integer(word, block, BITS, zero) * scale
        tl.store(weight + here, value.to(dtype), mask=inside & (here + column < n)[None, :])


@triton.jit
def _grid(scales, zeros, row, group, groups, height, BITS: tl.constexpr, PER_ROW: tl.constexpr):
    """Scale and zero point of each row in a group, fp32, to go beside columns; zeros past the last group."""
    place = row if PER_ROW else group * height + row
    inside = row < (height if PER_ROW else tl.where(group < groups, height, 0))
    scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)[:, None]
    if zeros is None:
        zero = tl.full(scale.shape, 2 ** (BITS - 1), tl.float32)
    else:
        zero = tl.load(zeros + place, mask=inside, other=0).to(tl.float32)[:, None]
    return scale, zero


@triton.jit
def _integer(word, block: tl.constexpr, BITS: tl.constexpr, zero):
    """code - zero in fp32, exactly: in the mantissa of 2^23 a code at bit s is worth 2^s of itself."""
    PER_HALF: tl.constexpr = 16 // BITS
    s: tl.constexpr = BITS * (block % PER_HALF)
    mask: tl.constexpr = ((1 << BITS) - 1) << s
    half = word >> 16 if block >= PER_HALF else word
    written = ((half & mask) | 0x4B000000).to(tl.float32, bitcast=True)
    return written * (1.0 / (1 << s)) - (8388608.0 / (1 << s) + zero)


@triton.jit
def _ones(TILE: tl.constexpr, dtype: tl.constexpr):
    one: tl.constexpr = 0x3F80 if dtype == tl.bfloat16 else 0x3C00
    return tl.full((TILE, 32), one, tl.int16).to(dtype, bitcast=True)


@triton.jit
def _origin(dtype: tl.constexpr):
    """A power of two in whose mantissa a code of 4 bits is worth itself."""
    return 128.0 if dtype == tl.bfloat16 else 1024.0


@triton.jit
def _raw(word, block: tl.constexpr, dtype: tl.constexpr):
    """_origin + code: blocks i and i + 4 of a word in the same operations."""
    origins: tl.constexpr = 0x43004300 if dtype == tl.bfloat16 else 0x64006400
    pair = ((word >> 4 * (block % 4)) & 0x000F000F) | origins
    half = pair >> 16 if block >= 4 else pair
    return half.to(tl.int16).to(dtype, bitcast=True)
