"""Products with packed weights in Triton: for GPUs where our CUDA library was not built.

Weights enter the tensor cores as the integers q - z, which every activation dtype holds exactly, and the scale of a
group is applied to the fp32 sum over the group: so a weight is never rounded. Sums have a fixed order, without atomics;
a product that is split along the columns leaves fp32 parts, which a second kernel adds from the first to the last.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from llmquant.kernels import slabs
from llmquant.kernels.layout import CHUNK, Packed, exact_dtype
from llmquant.kernels.tuning import Config, choose, most_tokens
from llmquant.scheme import Quantized, Scheme

ROWS = 128  # out features are filled up to a multiple of it, so that no tile of them needs bounds
WHOLE = 128  # columns of a step where a row is one group; otherwise a step is a group
SUMMED = 1024  # outputs of one program that adds parts
FILLED = 32  # rows of one program that dequantizes
FUSED = True  # a multiplication and an addition in one rounding


def step_of(scheme: Scheme) -> int:
    """Columns that are multiplied before their scale is applied."""
    return WHOLE if scheme.group_size == -1 else scheme.group_size


def shapes(m: int, n: int, scheme: Scheme) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the codes, the scales and the zeros."""
    rows, step = -(-m // ROWS) * ROWS, step_of(scheme)
    grid = scheme.groups(n), rows
    return (rows, -(-n // step) * step * scheme.bits // 8), grid, grid


def pack(q: Quantized, scheme: Scheme) -> Packed:
    """A quantized weight [m, n] of 4 or 8 bits, filled up to m' rows and to whole steps, n' columns.

    codes: uint8 [m', n' / 2]. Byte 16 c + j of a row holds the codes of columns 32 c + j (low nibble) and 32 c + 16 + j
        (high): two halves that meet two halves of the activations, and no code has to change its place. With 8 bits
        [m', n'], in their order.
    scales: one of layout.KINDS [G, m'].
    zeros: uint8 [G, m'].
    """
    m, n = q.codes.shape
    below = -m % ROWS
    codes = F.pad(q.codes, (0, -n % step_of(scheme), 0, below))
    if scheme.bits == 4:
        halves = codes.view(len(codes), -1, 2, CHUNK // 2)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
    held = q.scales.to(exact_dtype(q.scales))
    scales, zeros = (F.pad(grid, (0, 0, 0, below)).T.contiguous() for grid in (held, q.zeros))
    return Packed(codes, scales, None if scheme.symmetric else zeros)


def unpack(packed: Packed, m: int, n: int, scheme: Scheme) -> Quantized:
    """The inverse of `pack`."""
    codes = packed.codes
    if scheme.bits == 4:
        bytes_ = codes.view(len(codes), -1, CHUNK // 2)
        codes = torch.stack((bytes_ & 15, bytes_ >> 4), 2).flatten(1)
    scales = packed.scales.T[:m].float().contiguous()
    zeros = torch.full_like(scales, scheme.midpoint) if packed.zeros is None else packed.zeros.T[:m]
    return Quantized(codes[:m, :n].contiguous(), scales, zeros.to(torch.uint8).contiguous())


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
            *packed,
            bias if whole else None,
            parts,
            tokens,
            m,
            n,
            packed.codes.shape[0],
            **_constants(n, scheme),
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
    constants = _constants(n, scheme)
    with torch.cuda.device_of(weight):
        _dequantize[(-(-count // FILLED), -(-n // constants["STEP"]))](
            *packed, weight, first, count, n, packed.codes.shape[0], **constants, TILE=FILLED, enable_fp_fusion=FUSED
        )
    return weight


def _constants(n: int, scheme: Scheme) -> dict[str, int]:
    return {"BITS": scheme.bits, "STEP": step_of(scheme), "PER_ROW": int(scheme.group_size == -1)}


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
    STEP: tl.constexpr,
    PER_ROW: tl.constexpr,
    TILE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """y [SPLIT, tokens, m], in fp32 where SPLIT > 1. The weight is the left operand: it goes from memory into registers
    and from there into the product."""
    BYTES: tl.constexpr = STEP * BITS // 8  # of a row in a step
    dtype = x.dtype.element_ty
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    part, steps, byte = tl.program_id(2), tl.cdiv(n, STEP), tl.arange(0, BYTES)
    column = _column(byte, BITS)
    codes += row[:, None].to(tl.int64) * (steps * BYTES) + byte[None, :]
    x += token[None, :].to(tl.int64) * n + column[:, None]
    asked = (token < tokens)[None, :]
    sums = tl.zeros((TILE, TOKENS), tl.float32)
    first = part * tl.cdiv(steps, SPLIT)
    for step in range(first, min(first + tl.cdiv(steps, SPLIT), steps)):
        scale, zero = _grid(scales, zeros, row, step, height, BITS, PER_ROW)
        code, here = tl.load(codes + step * BYTES), step * STEP + column[:, None]
        low = tl.load(x + step * STEP, mask=asked & (here < n), other=0.0)
        W = _integer(code & 15 if BITS == 4 else code, zero).to(dtype)
        product = tl.dot(W, low, input_precision="ieee")
        if BITS == 4:
            high = tl.load(x + step * STEP + 16, mask=asked & (here + 16 < n), other=0.0)
            W = _integer(code >> 4, zero).to(dtype)
            product = tl.dot(W, high, product, input_precision="ieee")
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
    STEP: tl.constexpr,
    PER_ROW: tl.constexpr,
    TILE: tl.constexpr,
):
    BYTES: tl.constexpr = STEP * BITS // 8
    dtype = weight.dtype.element_ty
    step, steps, byte = tl.program_id(1), tl.cdiv(n, STEP), tl.arange(0, BYTES)
    local = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, inside = first + local, (local < count)[:, None]
    scale, zero = _grid(scales, zeros, row, step, height, BITS, PER_ROW)
    code = tl.load(codes + row[:, None].to(tl.int64) * (steps * BYTES) + step * BYTES + byte[None, :], mask=inside)
    column = step * STEP + _column(byte, BITS)[None, :]
    weight += local[:, None].to(tl.int64) * n + column
    value = _integer(code & 15 if BITS == 4 else code, zero) * scale
    tl.store(weight, value.to(dtype), mask=inside & (column < n))
    if BITS == 4:
        tl.store(weight + 16, (_integer(code >> 4, zero) * scale).to(dtype), mask=inside & (column + 16 < n))


@triton.jit
def _grid(scales, zeros, row, step, height, BITS: tl.constexpr, PER_ROW: tl.constexpr):
    """Scale and zero point of each row in a step, fp32, to go beside columns."""
    place = row if PER_ROW else step * height + row
    inside = row < height
    scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)[:, None]
    if zeros is None:
        zero = tl.full(scale.shape, 2 ** (BITS - 1), tl.float32)
    else:
        zero = tl.load(zeros + place, mask=inside, other=0).to(tl.float32)[:, None]
    return scale, zero


@triton.jit
def _column(byte, BITS: tl.constexpr):
    """Of a step: that of each byte, or of its low nibble; the high one's is 16 further."""
    return byte // 16 * 32 + byte % 16 if BITS == 4 else byte


@triton.jit
def _integer(code, zero):
    """code - zero in fp32, exactly: the float 2^23 + code has the code in its lowest bits, and costs no conversion."""
    return (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)
