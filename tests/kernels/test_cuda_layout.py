"""The layout of the CUDA kernels: the same weight comes back, and every number stands where docs/cuda.md says."""

import math

import pytest
import torch
from emulated_cuda import Emulator, random_weight

from llmquant.scheme import Quantized, Scheme, dequantize

SCHEMES = [Scheme(4, g, sym) for g in (32, 64, 128, -1) for sym in (True, False)]
SHAPES = [(1, 1), (64, 128), (65, 129), (130, 200), (257, 384)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_weight_comes_back(emulator: Emulator, scheme: Scheme, shape: tuple[int, int]) -> None:
    q = random_weight(scheme, *shape)
    for dtype in DTYPES:
        assert all(map(torch.equal, emulator.unpack(emulator.pack(q, scheme, dtype)), q))


def test_three_bits_are_held_as_four(emulator: Emulator) -> None:
    q = random_weight(Scheme(3, 32, symmetric=True), 70, 96)
    packed = emulator.pack(q, Scheme(4, 32, symmetric=False), torch.float16)
    assert all(map(torch.equal, emulator.unpack(packed), q))
    assert int(q.codes.max()) == 7
    assert set(q.zeros.flatten().tolist()) == {4}


@pytest.mark.parametrize("shape", [(64, 128), (65, 129), (130, 200)], ids=str)
def test_every_code_has_its_place(emulator: Emulator, shape: tuple[int, int]) -> None:
    scheme = Scheme(4, 32, symmetric=False)
    q = random_weight(scheme, *shape)
    packed = emulator.pack(q, scheme, torch.float16)
    m, n = shape
    tiles, steps, groups = math.ceil(m / 128) * 2, math.ceil(n / 128) * 8, math.ceil(n / 128) * 4
    assert packed.codes.shape == (tiles, steps, 32, 4)
    assert packed.scales.shape == (tiles, groups, 64)
    words, zeros = packed.codes.tolist(), packed.zeros.tolist()
    used = 0
    for r in range(m):
        for c in range(n):
            tile, j, b, group = r // 64, r % 64 // 16, r % 16 // 8, r % 8
            step, h, t, e = c // 16, c % 16 // 8, c % 8 // 2, c % 2
            p = 4 * e + 2 * h + b
            assert words[tile][step][4 * group + t][j] >> 4 * p & 15 == int(q.codes[r, c])
            used += int(q.codes[r, c]) > 0
            if c % 32 == 0:
                position = 2 * j + b
                assert packed.scales[tile, c // 32, 8 * group + position] == q.scales[r, c // 32]
                assert zeros[tile][c // 32][group] >> 4 * position & 15 == int(q.zeros[r, c // 32])
    nibbles = packed.codes.unsqueeze(-1) >> torch.arange(0, 32, 4) & 15
    assert int(nibbles.count_nonzero()) == used, "what fills up is zero"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_slabs_are_the_weight_rounded_once(emulator: Emulator, scheme: Scheme, dtype: torch.dtype) -> None:
    for m, n in SHAPES[1:]:
        q = random_weight(scheme, m, n)
        real = dequantize(q, scheme)
        for scale_dtype in DTYPES:
            packed = emulator.pack(q, scheme, scale_dtype)
            assert torch.equal(emulator.dequantize(packed, 0, m, dtype), real.to(dtype))
            if m > 64:
                assert torch.equal(emulator.dequantize(packed, 64, m - 64, dtype), real[64:].to(dtype))


def test_slabs_of_scales_that_are_no_powers_of_two(emulator: Emulator) -> None:
    scheme = Scheme(4, 64, symmetric=False)
    q = random_weight(scheme, 64, 256)
    q = Quantized(q.codes, torch.rand(64, 4).half().float(), q.zeros)
    packed = emulator.pack(q, scheme, torch.float16)
    for dtype in (*DTYPES, torch.float32):
        assert torch.equal(emulator.dequantize(packed, 0, 64, dtype), dequantize(q, scheme).to(dtype))
