"""The definition itself, against loops over single numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import SCHEMES, relative_error, weight

from llmquant.formats import bits as words
from llmquant.kernels import reference
from llmquant.scheme import Scheme


@pytest.mark.parametrize("bits", [4, 8])
@given(m=st.integers(1, 4), n=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_codes_come_back(bits: int, m: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (m, n), dtype=torch.uint8, generator=generator)
    packed = reference.pack_codes(codes, bits)
    assert packed.shape == (m, -(-n * bits // 8))
    assert torch.equal(reference.unpack_codes(packed, n, bits), codes)


def test_the_low_nibble_comes_first() -> None:
    assert reference.pack_codes(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_are_those_of_the_words_in_checkpoints(bits: int) -> None:
    codes = (torch.arange(64).reshape(2, 32) * 5 % 2**bits).to(torch.uint8)
    assert torch.equal(reference.pack_codes(codes, bits), words.pack(codes, bits).view(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("n", [128, 150])
def test_product_is_the_definition(scheme: Scheme, n: int) -> None:
    w = weight(scheme, 5, n)
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(1))
    bias = torch.arange(5.0)
    y = reference.linear(x, *w.operands, bias, scheme)
    assert y.shape == (2, 3, 5)
    assert relative_error(y, x.double() @ w.real.T + bias) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_only_at_the_door(dtype: torch.dtype) -> None:
    w = weight(Scheme(4, 32), 8, 64)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = reference.linear(x, *w.operands, None, w.scheme)
    assert y.dtype == dtype
    assert torch.equal(y, reference.linear(x.float(), *w.operands, None, w.scheme).to(dtype))
