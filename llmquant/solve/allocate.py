"""Mixed precision as a knapsack: one option for each group of linears, the least loss that a budget buys.

Losses add up: they are second-order terms of one divergence, and the rounding errors of different linears hardly know
of each other. The budget is cut into cells and the problem solved for every number of them at once (dynamic
programming), so that the answer is exact but for the rounding of costs up to whole cells; what that leaves unspent is
spent by single exchanges in the end.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from llmquant.errors import RecipeError

CELLS = 1 << 16  # of the budget


class Option(NamedTuple):
    """What may become of one group of linears."""

    cost: int  # bits that it takes
    loss: float  # nats of divergence


Options = Sequence[Option]


def within_budget(groups: Sequence[Options], budget: int) -> list[int]:
    """The option of each group with the least sum of losses, the sum of costs at most `budget`.

    Raises:
        RecipeError: the cheapest options together cost more.
    """
    least = sum(min(option.cost for option in options) for options in groups)
    if least > budget:
        raise RecipeError(f"the smallest choice for every linear takes {least} bits together, allowed are {budget}")
    cell = max(1, ceil((budget - least) / CELLS))
    losses, choices = _table(groups, cell, (budget - least) // cell)
    return _improved(groups, _traced(groups, choices, cell, int(losses.argmin())), budget)


def within_loss(groups: Sequence[Options], loss: float) -> list[int]:
    """The option of each group with the least sum of costs, the sum of losses at most `loss`.

    Raises:
        RecipeError: the best options together lose more.
    """
    best = sum(min(option.loss for option in options) for options in groups)
    if best > loss:
        raise RecipeError(f"the best choice for every linear loses {best:.2g} nats together, allowed are {loss:.2g}")
    most = sum(max(o.cost for o in options) - min(o.cost for o in options) for options in groups)
    cell = max(1, ceil(most / CELLS))
    losses, choices = _table(groups, cell, ceil(most / cell) + len(groups))
    return _traced(groups, choices, cell, int((losses <= loss).nonzero()[0]))


def _extras(options: Options, cell: int) -> list[int]:
    """Cells that each option takes beyond the cheapest one, rounded up."""
    least = min(option.cost for option in options)
    return [ceil((option.cost - least) / cell) for option in options]


def _table(groups: Sequence[Options], cell: int, cells: int) -> tuple[Tensor, Tensor]:
    """For each number of cells 0 .. cells, the least loss, and which option of each group leads to it.

    Returns float64 [cells + 1] and uint8 [groups, cells + 1]; exactly so many cells are taken, losses are inf where
    that cannot be.
    """
    losses = torch.full((cells + 1,), torch.inf, dtype=torch.float64)
    losses[0] = 0.0
    choices = torch.zeros(len(groups), cells + 1, dtype=torch.uint8)
    for choice, options in zip(choices, groups, strict=True):
        before, losses = losses, torch.full_like(losses, torch.inf)
        for number, (option, extra) in enumerate(zip(options, _extras(options, cell), strict=True)):
            if extra <= cells:
                reached = before[: cells + 1 - extra] + option.loss
                better = reached < losses[extra:]
                losses[extra:] = torch.where(better, reached, losses[extra:])
                choice[extra:][better] = number
    return losses, choices


def _traced(groups: Sequence[Options], choices: Tensor, cell: int, cells: int) -> list[int]:
    """The options that lead to so many cells, from the last group back to the first."""
    chosen: list[int] = []
    for options, choice in zip(reversed(groups), choices.flip(0), strict=True):
        chosen.append(int(choice[cells]))
        cells -= _extras(options, cell)[chosen[-1]]
    return chosen[::-1]


def _improved(groups: Sequence[Options], chosen: list[int], budget: int) -> list[int]:
    """The same choice with what is left of the budget spent, the exchange that gains most first."""
    left = budget - sum(options[i].cost for options, i in zip(groups, chosen, strict=True))
    while True:
        exchanges = [
            (options[chosen[g]].loss - option.loss, g, number, option.cost - options[chosen[g]].cost)
            for g, options in enumerate(groups)
            for number, option in enumerate(options)
            if option.cost - options[chosen[g]].cost <= left and option.loss < options[chosen[g]].loss
        ]
        if not exchanges:
            return chosen
        _, g, number, cost = max(exchanges)
        chosen[g], left = number, left - cost
