"""How far numbers are from all being of one size, which is what a common scale wants them to be."""

from typing import NamedTuple

import torch
from torch import Tensor


class Outliers(NamedTuple):
    """Statistics of activations or weights by channel (column)."""

    max_to_median: float  # the largest channel's maximum over the median channel's, in magnitude
    kurtosis: float  # E x^4 / (E x^2)^2 over all numbers: 3 if they are Gaussian
    dead: int  # channels that are zero throughout


class Channels:
    """Running sums by channel."""

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self._most = torch.zeros(n, device=device)
        self._powers = torch.zeros(2, dtype=torch.float64)  # sums of x^2 and x^4
        self._count = 0

    def update(self, x: Tensor) -> None:
        """Add rows `x` [k, n]."""
        squares = x.float().square()
        torch.maximum(self._most, squares.amax(0).sqrt(), out=self._most)
        self._powers += torch.stack([squares.sum(dtype=torch.float64), squares.square().sum(dtype=torch.float64)]).cpu()
        self._count += x.numel()

    def outliers(self) -> Outliers:
        """Of all that was added; channels that are zero throughout do not enter the median."""
        alive = self._most[self._most > 0]
        if not len(alive):
            return Outliers(1.0, 0.0, len(self._most))
        second, fourth = (self._powers / self._count).tolist()
        return Outliers(float(alive.max() / alive.median()), fourth / second**2, len(self._most) - len(alive))


def outliers(W: Tensor) -> Outliers:
    """Of one matrix [k, n]."""
    channels = Channels(W.shape[1], W.device)
    channels.update(W)
    return channels.outliers()
