"""From losses to a recipe: bits and group sizes for each group of linears, the best that a budget buys."""

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmquant.assign import Linear
from llmquant.calibration.batches import Calibration
from llmquant.checkpoint import durable
from llmquant.checkpoint.strict_json import parse_object
from llmquant.checkpoint.writer import json_bytes
from llmquant.errors import RecipeError
from llmquant.formats import FORMATS
from llmquant.model.shell import Shell
from llmquant.plan import Plan, make_plan, stored_bits
from llmquant.recipe import Override, Recipe, Target
from llmquant.scheme import Scheme
from llmquant.sensitivity.measure import LinearSensitivity, Noticed, Sensitivity, measure, unnoticed
from llmquant.solve.allocate import Option, within_budget, within_loss

Linears = tuple[LinearSensitivity, ...]  # that share an input, and are treated alike


@dataclass(frozen=True)
class Choice:
    """A scheme for all linears of a group, None to keep them, with its cost and its loss."""

    scheme: Scheme | None
    option: Option


@dataclass(frozen=True)
class Mixture:
    """Mixed precision that was chosen, and what it is predicted to be worth."""

    recipe: Recipe  # without a target: its overrides say all
    bits_per_weight: float  # of all linears of the layers, kept ones too
    predicted_kl: float
    counts: dict[str, int]  # linears by scheme

    def to_dict(self) -> dict[str, Any]:
        figures = {"bits_per_weight": self.bits_per_weight, "predicted_kl": self.predicted_kl, "counts": self.counts}
        return {"recommended": figures | {"recipe": self.recipe.model_dump(mode="json")}}

    def __str__(self) -> str:
        figures = f"{self.bits_per_weight:.3f} bits per weight, predicted KL {self.predicted_kl:.4f}"
        return f"mixed precision: {figures}: " + ", ".join(f"{count} {scheme}" for scheme, count in self.counts.items())


def mix(sensitivity: Sensitivity, plan: Plan, shell: Shell, target: Target) -> Mixture:
    """The least predicted KL for so many bits per weight or bytes, or the fewest bits for so much KL.

    Args:
        plan: of the same recipe without regard to its target.

    Raises:
        RecipeError: the target cannot be reached.
    """
    costs = _Costs(shell, plan.recipe)
    menus = [_menu(linears, plan.recipe, target, costs) for linears in sensitivity.groups]
    options = [[choice.option for choice in menu] for menu in menus]
    weights = sum(linear.m * linear.n for linear in sensitivity.linears)
    try:
        if target.kl is not None:
            chosen = within_loss(options, target.kl)
        elif target.bits is not None:
            chosen = within_budget(options, int(target.bits * weights))
        else:
            others = 8 * plan.bytes_out - sum(costs.planned(linear) for linear in sensitivity.linears)
            chosen = within_budget(options, 8 * (target.size or 0) - others)
    except RecipeError as error:
        raise RecipeError(f"target: {error} ({weights} weights); loosen it, or `choices` and `overrides`") from error
    taken = [menu[i] for menu, i in zip(menus, chosen, strict=True)]
    counts = defaultdict[str, int](int)
    for linears, choice in zip(sensitivity.groups, taken, strict=True):
        counts[str(choice.scheme or "kept")] += len(linears)
    return Mixture(
        _recipe(sensitivity, plan.recipe, [choice.scheme for choice in taken]),
        sum(choice.option.cost for choice in taken) / weights,
        sum(choice.option.loss for choice in taken),
        dict(sorted(counts.items())),
    )


def settle(
    plan: Plan, shell: Shell, calibration: Calibration, memory: Path | None = None, noticed: Noticed = unnoticed
) -> Plan:
    """The plan with its target, if it has one, in the form of overrides.

    What was measured for is kept in the file `memory`, where it is taken from if it is there: a run that goes on after
    a stop has to go on with the same choice, and need not measure again.
    """
    target = plan.recipe.target
    if target is None:
        return plan
    if memory is not None and memory.is_file():
        kept = parse_object(memory.read_bytes(), memory)
        recipe, note = Recipe.from_dict(kept["recipe"], str(memory)), str(kept["note"])
    else:
        mixture = mix(measure(plan.recipe, shell, calibration.batches, noticed=noticed), plan, shell, target)
        recipe, note = mixture.recipe, str(mixture)
        if memory is not None:
            durable.write_file(memory, [json_bytes({"recipe": recipe.model_dump(mode="json"), "note": note})])
    settled = make_plan(recipe, shell)
    return replace(settled, notes=(note, *settled.notes))


def refuse_unreachable(plan: Plan, shell: Shell, target: Target) -> None:
    """What codes alone exceed is refused before the model is measured, which takes minutes.

    Raises:
        RecipeError: no choice reaches the target.
    """
    cost = _Costs(shell, plan.recipe)
    fewest = planned = weights = 0
    for linear in plan.linears:
        stays = cost(linear, linear.scheme)
        planned += stays
        fewest += stays if _pinned(plan.recipe, linear) else min(target.choices) * linear.m * linear.n
        weights += linear.m * linear.n
    others = 8 * plan.bytes_out - planned
    if target.bits is not None and fewest > target.bits * weights:
        least = f"{target.bits:g} bits per weight, but codes alone take {fewest / weights:.2f}"
    elif target.size is not None and others + fewest > 8 * target.size:
        least = f"{target.size} bytes, but codes and what is not quantized take {(others + fewest) // 8}"
    else:
        return
    raise RecipeError(f"target: {least}; loosen it, or `choices` and `overrides`")


def _pinned(recipe: Recipe, *linears: Linear | LinearSensitivity) -> bool:
    return any(override.matches(linear.name) for override in recipe.overrides for linear in linears)


@dataclass(frozen=True)
class _Costs:
    """Bits that a linear takes."""

    shell: Shell
    recipe: Recipe

    def __call__(self, linear: Linear | LinearSensitivity, scheme: Scheme | None) -> int:
        if scheme is None:
            dtype = self.shell.stored_dtype(f"{linear.name}.weight")
            return 8 * dtype.itemsize * linear.m * linear.n
        return stored_bits(linear.m, linear.n, scheme, self.recipe.format)

    def planned(self, linear: LinearSensitivity) -> int:
        return self(linear, linear.assigned)


def _menu(linears: Linears, recipe: Recipe, target: Target, cost: _Costs) -> list[Choice]:
    """What may become of the group: what an override says, or anything that the format holds."""
    first = linears[0]
    if _pinned(recipe, *linears):
        schemes: list[Scheme | None] = [first.assigned]
    else:
        held = [s for s in first.losses if not any(FORMATS[recipe.format].refuse(x.m, x.n, s) for x in linears)]
        schemes = [scheme for scheme in held if scheme.bits in target.choices]
        schemes += [None] if 16 in target.choices or not schemes else []
    return [Choice(s, Option(sum(cost(x, s) for x in linears), sum(_kl(x, s) for x in linears))) for s in schemes]


def _kl(linear: LinearSensitivity, scheme: Scheme | None) -> float:
    return linear.losses[scheme].kl if scheme else 0.0


def _recipe(sensitivity: Sensitivity, recipe: Recipe, schemes: list[Scheme | None]) -> Recipe:
    """The recipe with an override for each kind of linear and scheme that is not its own already.

    One expression holds the numbers of all layers: `re:model\\.layers\\.(?:0|7)\\.(?:mlp\\.down_proj)`.
    """
    changed: dict[tuple[str, tuple[str, ...], Scheme | None], list[str]] = defaultdict(list)
    for linears, scheme in zip(sensitivity.groups, schemes, strict=True):
        if scheme != linears[0].assigned:
            stem, _, number = linears[0].layer.rpartition(".")
            leaves = tuple(linear.name.removeprefix(f"{linear.layer}.") for linear in linears)
            changed[stem, leaves, scheme].append(number)
    overrides = [
        Override(
            match=f"re:{re.escape(stem)}\\.(?:{'|'.join(numbers)})\\.(?:{'|'.join(map(re.escape, leaves))})",
            **({"bits": scheme.bits, "group_size": scheme.group_size} if scheme else {"skip": True}),
        )
        for (stem, leaves, scheme), numbers in changed.items()
    ]
    return recipe.model_copy(update={"overrides": (*recipe.overrides, *overrides), "target": None})
