"""The knapsack against every choice there is."""

import itertools
import random

import pytest

from llmquant.errors import RecipeError
from llmquant.solve import allocate
from llmquant.solve.allocate import Option, within_budget, within_loss


def problem(seed: int, groups: int = 5, options: int = 4) -> list[list[Option]]:
    """Losses fall as costs rise, as they do with bits, by another factor in each group."""
    rng = random.Random(seed)
    found = []
    for _ in range(groups):
        scale, size = 10 ** rng.uniform(-3, 1), rng.randint(50, 5000)
        bits = sorted(rng.sample(range(3, 17), options))
        found.append([Option(size * b, scale * 4.0**-b * rng.uniform(0.5, 2)) for b in bits])
    return found


def cost(groups: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> int:
    return sum(options[i].cost for options, i in zip(groups, chosen, strict=True))


def loss(groups: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> float:
    return sum(options[i].loss for options, i in zip(groups, chosen, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_least_loss_within_a_budget(seed: int) -> None:
    groups = problem(seed)
    every = list(itertools.product(*(range(len(options)) for options in groups)))
    costs = sorted(cost(groups, chosen) for chosen in every)
    for budget in (costs[0], costs[len(costs) // 3], costs[len(costs) // 2], costs[-1]):
        chosen = within_budget(groups, budget)
        best = min(loss(groups, other) for other in every if cost(groups, other) <= budget)
        assert cost(groups, chosen) <= budget
        assert loss(groups, chosen) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_least_cost_within_a_loss(seed: int) -> None:
    groups = problem(seed)
    every = list(itertools.product(*(range(len(options)) for options in groups)))
    losses = sorted(loss(groups, chosen) for chosen in every)
    for bound in (losses[0] * 1.000001, losses[len(losses) // 2], losses[-1]):
        chosen = within_loss(groups, bound)
        assert loss(groups, chosen) <= bound
        assert cost(groups, chosen) == min(cost(groups, other) for other in every if loss(groups, other) <= bound)


def test_coarse_cells_stay_within_the_budget_and_near_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is larger than its cells: costs are rounded up, and what that leaves is spent."""
    groups = problem(7, groups=40)
    budget = (cost(groups, [0] * 40) + cost(groups, [3] * 40)) // 2
    exact = loss(groups, within_budget(groups, budget))
    monkeypatch.setattr(allocate, "CELLS", 512)
    chosen = within_budget(groups, budget)
    assert cost(groups, chosen) <= budget
    assert exact <= loss(groups, chosen) <= 1.1 * exact


def test_what_cannot_be_is_refused() -> None:
    groups = problem(0)
    with pytest.raises(RecipeError, match="smallest choice"):
        within_budget(groups, cost(groups, [0] * 5) - 1)
    with pytest.raises(RecipeError, match="best choice"):
        within_loss(groups, loss(groups, [3] * 5) * 0.99)
