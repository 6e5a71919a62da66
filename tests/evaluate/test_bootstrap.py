"""Block bootstrap: against closed forms, and that it covers what it promises to."""

import pytest
import torch

from llmquant.evaluate.bootstrap import BLOCK, intervals

MEAN = {"mean": lambda means: means[0]}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_of_independent_tokens_it_is_the_standard_error():
    values = noise(1, 400 * BLOCK)
    low, high = intervals(values, MEAN)["mean"]
    width = 2 * 1.96 * float(values.std()) / values.shape[1] ** 0.5
    assert high - low == pytest.approx(width, rel=0.1)
    assert low < float(values.mean()) < high


def test_alike_neighbours_make_it_wider():
    """Constant within each block, the blocks are the sample."""
    values = noise(1, 100).repeat_interleave(BLOCK, dim=1)
    low, high = intervals(values, MEAN)["mean"]
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 100**0.5, rel=0.12)


def test_both_models_are_drawn_together():
    """What they share cancels in the difference."""
    shared = 10 * noise(1, 20 * BLOCK)
    found = intervals(torch.cat([shared + 1, shared]), {"difference": lambda means: means[0] - means[1]})
    assert found["difference"] == pytest.approx((1, 1))


def test_nineteen_of_twenty_intervals_hold_the_truth():
    held = 0
    for seed in range(200):
        low, high = intervals(noise(1, 40 * BLOCK, seed=seed), MEAN)["mean"]
        held += low <= 0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_same_figures_same_interval_and_a_short_rest_counts_by_its_length():
    values = noise(1, 8 * BLOCK + 7)
    assert intervals(values, MEAN) == intervals(values.clone(), MEAN)
    low, high = intervals(torch.ones(1, 8 * BLOCK + 7), MEAN)["mean"]
    assert (low, high) == pytest.approx((1, 1))


def test_a_few_blocks_give_none():
    assert intervals(noise(1, 7 * BLOCK), MEAN) == {}
