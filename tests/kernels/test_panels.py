"""Packed: the same weight comes back, and every number stands where csrc/cpu/linear.h says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SCHEMES, weight

from llmquant.kernels.layout import pack, unpack
from llmquant.scheme import Quantized, Scheme


@settings(deadline=None)
@given(st.sampled_from(SCHEMES), st.integers(1, 40), st.integers(1, 170))
def test_the_weight_comes_back(scheme: Scheme, m: int, n: int) -> None:
    w = weight(scheme, m, n)
    assert all(map(torch.equal, unpack(w.panels, m, n, scheme), w.q))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_has_its_place(bits: int) -> None:
    scheme, m, n = Scheme(bits, 32, symmetric=False), 18, 70
    w = weight(scheme, m, n)
    steps = w.panels.codes.tolist()
    for row in range(m):
        for column in range(n):
            step, place = divmod(column, 32 // bits)
            byte = steps[row // 16][step][row % 16][place % 4]
            assert int(w.q.codes[row, column]) == (byte if bits == 8 else byte >> place // 4 * 4 & 15)


def test_what_fills_up_is_zero() -> None:
    scheme = Scheme(4, 32, symmetric=False)
    codes = torch.full((17, 33), 15, dtype=torch.uint8)
    panels = pack(Quantized(codes, torch.ones(17, 2), torch.full((17, 2), 3, dtype=torch.uint8)), scheme)
    assert panels.codes.shape == (2, 8, 16, 4)
    assert int((panels.codes & 15).count_nonzero() + (panels.codes >> 4).count_nonzero()) == 17 * 33
    assert int(panels.scales.count_nonzero()) == int(panels.zeros.count_nonzero()) == 17 * 2


@pytest.mark.parametrize(
    ("value", "dtype"), [(1.5, torch.bfloat16), (1 + 2**-10, torch.float16), (1 + 2**-20, torch.float32)]
)
def test_scales_are_held_exactly(value: float, dtype: torch.dtype) -> None:
    q = Quantized(torch.zeros(2, 32, dtype=torch.uint8), torch.tensor([[1.0], [value]]), torch.full((2, 1), 8))
    panels = pack(q, Scheme(4, 32))
    assert panels.scales.dtype == dtype
    assert torch.equal(unpack(panels, 2, 32, Scheme(4, 32)).scales, q.scales)
