"""GGUF blocks: golden bytes, agreement with the gguf package, and integers that come back."""

import numpy as np
import pytest
import torch
from formats_cases import SCHEMES, quantized

from llmquant.formats import gguf as blocks
from llmquant.scheme import Quantized, Scheme, dequantize

HELD = [s for s in SCHEMES if s.bits != 8 or s.symmetric]


def test_golden_bytes() -> None:
    codes = (torch.arange(32) % 16).to(torch.uint8)[None]
    half, zero = torch.tensor([[0.5]]), torch.tensor([[3]], dtype=torch.uint8)
    nibbles = [0x11 * i for i in range(16)]
    assert blocks.pack("p", Quantized(codes, half, zero + 5), Scheme(4, 32)).tolist() == [[0x00, 0x38, *nibbles]]
    q4_1 = blocks.pack("p", Quantized(codes, half, zero), Scheme(4, 32, symmetric=False))
    assert q4_1.tolist() == [[0x00, 0x38, 0x00, 0xBE, *nibbles]]
    codes = torch.arange(112, 144).to(torch.uint8)[None]  # -16 .. 15
    q8_0 = blocks.pack("p", Quantized(codes, half, zero + 125), Scheme(8, 32))
    assert q8_0.tolist() == [[0x00, 0x38, *range(0xF0, 0x100), *range(16)]]


@pytest.mark.parametrize("scheme", HELD, ids=str)
def test_the_gguf_package_reads_the_weight_that_we_mean(scheme: Scheme) -> None:
    gguf = pytest.importorskip("gguf")
    q = quantized(scheme)
    packed = blocks.pack("p", q, scheme)
    type = blocks.kind(scheme)
    assert packed.shape == (16, 256 // 32 * blocks.SIZES[type])
    found = torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[type]).astype(np.float32))
    weight = dequantize(q, scheme)
    if type != "Q4_1":
        assert torch.equal(found, weight)
    off = (found - weight).abs() / q.scales.repeat_interleave(scheme.width(256), 1)
    assert float(off.max()) < 0.007


@pytest.mark.parametrize("scheme", HELD, ids=str)
def test_integers_come_back(scheme: Scheme) -> None:
    q = quantized(scheme)
    back = blocks.unpack(blocks.pack("p", q, scheme), 256, blocks.kind(scheme))
    shift = (8 if scheme.bits == 3 else scheme.midpoint) - scheme.midpoint
    repeat = scheme.width(256) // 32
    assert torch.equal(back.codes, q.codes + shift)
    assert torch.equal(back.scales, q.scales.repeat_interleave(repeat, 1))
    assert torch.equal(back.zeros, (q.zeros + shift).repeat_interleave(repeat, 1))


def test_refuse() -> None:
    assert blocks.refuse(7, 96, Scheme(4, 32)) is None
    assert blocks.refuse(7, 40, Scheme(4, -1)) == "40 columns are not a multiple of 32"
    assert "no zero point" in str(blocks.refuse(8, 64, Scheme(8, 32, symmetric=False)))


def test_rows_of_heads() -> None:
    rows = torch.arange(8)
    assert blocks.interleaved(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(blocks.halved(blocks.interleaved(rows, 2), 2), rows)
