"""Scales: representable, never worse than min-max under the weight they were searched with."""

import pytest
import torch

from llmquant.errors import NumericsError, RecipeError
from llmquant.scheme import GROUP_SIZES, MIN_SCALE, Scheme, dequantize
from llmquant.solve.grid import encode, minmax_grid, search_grid

SCHEMES = [Scheme(bits, g, symmetric) for bits in (3, 4, 8) for g in GROUP_SIZES for symmetric in (True, False)]


def weights(m: int = 24, n: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator) * torch.rand(m, 1, generator=generator) * 0.1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scales_are_exact_in_fp16_and_bf16(scheme: Scheme) -> None:
    scales, zeros = search_grid(weights(), torch.rand(256), scheme)
    assert torch.equal(scales, scales.half().float())
    assert torch.equal(scales, scales.bfloat16().float())
    assert scales.shape == zeros.shape == (24, scheme.groups(256))
    assert int(zeros.max()) <= scheme.max_code
    if scheme.symmetric:
        assert (zeros == scheme.midpoint).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_search_is_never_worse_than_minmax_in_any_group(scheme: Scheme) -> None:
    W, weight = weights(), torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4

    def group_errors(grid: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        difference = (W - dequantize(encode(W, *grid, scheme), scheme)) ** 2 * weight
        return difference.reshape(24, scheme.groups(256), -1).sum(-1)

    searched, plain = group_errors(search_grid(W, weight, scheme)), group_errors(minmax_grid(W, scheme))
    assert (searched <= plain * (1 + 1e-5)).all()
    assert scheme.bits == 8 or searched.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_minmax_rounding_error_is_within_half_a_step(scheme: Scheme) -> None:
    W = weights()
    q = encode(W, *minmax_grid(W, scheme), scheme)
    step = q.scales.abs().repeat_interleave(scheme.width(256), dim=1)
    # rounding the scale to 8 bits moves the outermost code by at most max_code * 2**-9 steps
    slack = 0.5 + scheme.max_code * 2.0**-8
    assert ((W - dequantize(q, scheme)).abs() <= slack * step).all()


def test_every_code_is_reached_and_decoded_exactly() -> None:
    scheme = Scheme(4, 32, symmetric=False)
    q = encode(
        (torch.arange(32) % 16).float()[None] - 5, torch.ones(1, 1), torch.full((1, 1), 5, dtype=torch.uint8), scheme
    )
    assert q.codes[0, :16].tolist() == list(range(16))
    assert torch.equal(dequantize(q, scheme)[0, :16], torch.arange(16.0) - 5)


@pytest.mark.parametrize("fill", [0.0, 1e-30, -1e-30, 3.0, -3.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_rows_keep_a_finite_scale(fill: float, symmetric: bool) -> None:
    scheme = Scheme(4, 32, symmetric)
    W = torch.full((2, 64), fill)
    q = encode(W, *search_grid(W, torch.ones(64), scheme), scheme)
    assert (q.scales.abs() >= MIN_SCALE).all()
    assert torch.allclose(dequantize(q, scheme), W, rtol=1e-2, atol=MIN_SCALE)


def test_a_single_outlier_does_not_make_anything_infinite() -> None:
    W = weights()
    W[0, 0] = 1e4
    q = encode(W, *search_grid(W, torch.ones(256), Scheme(4, 128)), Scheme(4, 128))
    assert torch.isfinite(dequantize(q, Scheme(4, 128))).all()


def test_a_weight_beyond_fp16_is_refused() -> None:
    W = weights()
    W[1, 3] = 1e9
    with pytest.raises(NumericsError, match="1e\\+09"):
        minmax_grid(W, Scheme())


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RecipeError, match="128 does not divide 192 columns"):
        minmax_grid(torch.zeros(2, 192), Scheme(4, 128))


def test_rows_are_independent_of_their_neighbours() -> None:
    W, weight, scheme = weights(m=64, n=4096), torch.rand(4096), Scheme(4, 64)  # more rows than one chunk of the search
    whole = search_grid(W, weight, scheme)
    part = search_grid(W[40:41], weight, scheme)
    assert torch.equal(whole[0][40:41], part[0])
    assert torch.equal(whole[1][40:41], part[1])
