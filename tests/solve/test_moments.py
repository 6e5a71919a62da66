"""Moments are those of the tokens that count, and of no others."""

import pytest
import torch

from llmquant.errors import NumericsError
from llmquant.solve.moments import STRIP, Moments


def random_inputs(k: int, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, n, generator=generator) @ torch.randn(n, n, generator=generator)


def test_masked_tokens_contribute_not_a_single_bit() -> None:
    x = random_inputs(20, 8).reshape(2, 10, 8)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 6:] = False
    with_padding, without = Moments(8), Moments(8)
    poisoned = x.clone()
    poisoned[~mask] = float("nan")  # even NaN must not get through
    with_padding.update(poisoned, mask)
    without.update(x[mask])
    assert torch.equal(with_padding.H("l"), without.H("l"))
    assert with_padding.tokens == 16


def test_mean_is_the_second_moment() -> None:
    X = random_inputs(64, 8)
    moments = Moments(8)
    moments.update(X[:40])
    moments.update(X[40:].reshape(2, 12, 8))
    assert torch.allclose(moments.H("l"), X.T @ X / 64, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_activations_are_named(poison: float) -> None:
    moments = Moments(4)
    x = torch.ones(3, 4)
    x[1, 2] = poison
    moments.update(x)
    with pytest.raises(NumericsError, match=r"layers\.3\.mlp\.down_proj: NaN or Inf"):
        moments.H("layers.3.mlp.down_proj")


def test_no_token_is_an_error() -> None:
    moments = Moments(4)
    moments.update(torch.ones(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(NumericsError, match="no calibration token"):
        moments.H("q_proj")


def test_wide_inputs_are_summed_in_strips_and_mirrored() -> None:
    X = random_inputs(40, STRIP + 70)
    moments = Moments(STRIP + 70)
    moments.update(X)
    assert torch.allclose(moments.H("l"), X.T @ X / 40, rtol=1e-4, atol=1e-2)
    assert torch.equal(moments.H("l"), moments.H("l").T)


def test_differences_from_the_original_model() -> None:
    X, original = random_inputs(64, 8), random_inputs(64, 8, seed=1)
    mask = torch.arange(64) < 50
    moments = Moments(8, compared=True)
    moments.update(X, mask, original)
    expected = (original - X)[:50].T @ X[:50] / 50
    assert torch.allclose(moments.D(), expected, rtol=1e-4, atol=1e-4)
    assert Moments(8).D() is None


def test_tokens_that_are_held_out_are_in_no_moment() -> None:
    X, original = random_inputs(30, 8), random_inputs(30, 8, seed=1)
    moments = Moments(8, compared=True)
    moments.update(X[:20], None, original[:20])
    assert moments.held_out() is None
    moments.hold_out(X[20:], torch.arange(10) < 7, original[20:])
    assert moments.tokens == 20
    assert torch.allclose(moments.H("l"), X[:20].T @ X[:20] / 20, rtol=1e-4, atol=1e-4)
    held, originals = moments.held_out()
    assert torch.equal(held, X[20:27])
    assert torch.equal(originals, original[20:27])
    moments.take_in()
    assert moments.held_out() is None
    assert moments.tokens == 27
    assert torch.allclose(moments.H("l"), X[:27].T @ X[:27] / 27, rtol=1e-4, atol=1e-4)
    assert torch.allclose(moments.D(), (original - X)[:27].T @ X[:27] / 27, rtol=1e-4, atol=1e-4)
