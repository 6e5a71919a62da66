"""Outlier statistics against their definitions."""

import pytest
import torch

from llmquant.solve.outliers import Channels, outliers


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 50
    x[:, 3] = 0
    channels = Channels(40)
    for part in x.split(70):
        channels.update(part)
    found = channels.outliers()
    most = x.abs().amax(0)
    assert found.dead == 1
    assert found.max_to_median == pytest.approx(float(most.max() / most[most > 0].median()))
    assert found.kurtosis == pytest.approx(float((x.double() ** 4).mean() / (x.double() ** 2).mean() ** 2), rel=1e-4)
    assert outliers(x) == pytest.approx(found)


def test_gaussian_numbers_have_kurtosis_three_and_zeros_are_all_dead() -> None:
    assert outliers(torch.randn(2000, 50, generator=torch.Generator().manual_seed(1))).kurtosis == pytest.approx(
        3, abs=0.1
    )
    assert outliers(torch.zeros(4, 6)) == (1.0, 0.0, 6)
