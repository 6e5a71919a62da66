"""How far a figure may be chance: confidence intervals by block bootstrap.

Neighbouring tokens are alike, so that single tokens cannot be drawn anew; blocks of them can (Kuensch, The jackknife
and the bootstrap for general stationary observations, 1989). The blocks do not overlap, and both models' figures of
a block are drawn together, so that the interval of a difference is that of the difference.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 256  # predicted tokens
LEAST = 8  # blocks: of fewer, draws are too much alike to say anything
DRAWS = 2000
SEED = 0
METHOD = f"95 %, percentiles of {DRAWS} paired draws of blocks of {BLOCK} tokens, seed {SEED}"

Interval = tuple[float, float]


def intervals(figures: Tensor, statistics: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, Interval]:
    """95 % intervals of what depends on means over tokens; none of fewer than LEAST blocks.

    Args:
        figures: [f, k], f figures of each of k tokens in the order of the text.
        statistics: each from means [f, draws] to values [draws].
    """
    blocks = figures.double().split(BLOCK, dim=1)
    if len(blocks) < LEAST:
        return {}
    sums = torch.stack([block.sum(1) for block in blocks], dim=1)  # [f, blocks]
    sizes = torch.tensor([block.shape[1] for block in blocks], dtype=torch.float64)
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randint(len(blocks), (DRAWS, len(blocks)), generator=generator)
    means = sums[:, drawn].sum(2) / sizes[drawn].sum(1)  # [f, draws]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: tuple(torch.quantile(statistic(means), ends).tolist()) for name, statistic in statistics.items()}
