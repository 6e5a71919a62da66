"""A product slab by slab."""

import pytest
import torch

from llmquant.kernels import slabs


@pytest.mark.parametrize("m", [1, 128, 300])
@pytest.mark.parametrize("biased", [True, False])
def test_slabs_make_up_the_whole(m: int, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "SLAB", 0)  # the least rows at a time
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(5, 40, generator=generator), torch.randn(m, 40, generator=generator)
    bias = torch.randn(m, generator=generator).double() if biased else None
    y, asked = torch.full((5, m), float("nan")), []

    def rows(first: int, count: int) -> torch.Tensor:
        asked.append((first, count))
        return W[first : first + count]

    slabs.multiply(x, rows, bias, y)
    expected = x.double() @ W.double().T + (bias if biased else 0)
    torch.testing.assert_close(y, expected.float())
    assert asked == [(first, min(slabs.ROWS, m - first)) for first in range(0, m, slabs.ROWS)]


@pytest.mark.parametrize(("n", "rows"), [(8192, 4096), (28672, 1152), (1 << 20, 128)])
def test_slabs_are_of_one_size_or_the_smallest(n: int, rows: int) -> None:
    assert slabs.rows_of(torch.empty(1, n, dtype=torch.bfloat16)) == rows
