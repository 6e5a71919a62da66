"""The bit order: every code in every place, and the words that other packers make of the same codes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmquant.formats import bits


@pytest.mark.parametrize("width", [4, 8])
def test_every_code_survives_in_every_place_of_a_word(width: int) -> None:
    codes = torch.arange(2**width, dtype=torch.uint8).repeat(32 // width, 1)
    for place in range(32 // width):
        codes[place] = codes[place].roll(place)
    assert torch.equal(bits.unpack(bits.pack(codes, width), width, codes.shape[1]), codes)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    assert bits.pack(torch.arange(8, dtype=torch.uint8), 4).tolist() == [0x76543210]
    assert bits.pack(torch.tensor([7, 57, 107, 157], dtype=torch.uint8), 8).tolist() == [0x9D6B3907 - 2**32]


def test_words_agree_with_shifts_and_sums() -> None:
    codes = torch.randint(0, 16, (5, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shifts = 4 * torch.arange(8)
    expected = (codes.long().unflatten(-1, (3, 8)) << shifts).sum(-1)
    assert torch.equal(bits.pack(codes, 4).long() % 2**32, expected)


@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 2**31))
def test_any_width_is_padded_to_words_and_comes_back(m: int, n: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**width, (m, n), dtype=torch.uint8, generator=generator)
    packed = bits.pack(codes, width)
    assert packed.shape == (m, bits.words(n, width))
    assert torch.equal(bits.unpack(packed, width, n), codes)


@pytest.mark.parametrize("width", [4, 8])
def test_transposed_input_is_read_by_value_not_by_memory(width: int) -> None:
    codes = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
    assert torch.equal(bits.pack(codes.T, width), bits.pack(codes.T.contiguous(), width))
