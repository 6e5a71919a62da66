"""Every linear's loss by every scheme, from one pass of the calibration text through the model and back.

The pass needs what quantizing needs, one layer in memory at a time, and the states before each layer, which go through
a file where they are many. It takes two forward passes, one backward pass of every fourth sequence, and solving for
each scheme on a sample of rows. With `isolated`, each layer is also quantized by itself and the divergence measured on
a few sequences: that passes all later layers anew, L (L + 1) / 2 layers for L of them.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmquant.assign import assign
from llmquant.calibration.batches import Batch
from llmquant.calibration.round_trip import RoundTrip, Tap
from llmquant.errors import CalibrationError, RecipeError
from llmquant.estimate import SPILL_BYTES
from llmquant.model.layout import Group, Layer, Layout, derive_layout
from llmquant.model.shell import Shell
from llmquant.recipe import Recipe
from llmquant.scheme import BITS, GROUP_SIZES, Scheme
from llmquant.sensitivity.isolated import isolated_kl, quantized
from llmquant.solve.methods import Choices
from llmquant.solve.outliers import Outliers, outliers
from llmquant.solve.prediction import Loss, Sensor, Trial

SEQUENCES = 32  # at most: more of them hardly change a ranking
JUDGING = 4  # one sequence of so many is what a scheme is judged by, with gradients; the solver sees the others

Noticed = Callable[[str, int], None]  # a layer's name, and how many are left


def unnoticed(layer: str, left: int) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class LinearSensitivity:
    """One linear: its numbers, and what each scheme would cost."""

    name: str
    layer: str
    m: int
    n: int
    assigned: Scheme | None  # by the recipe; None: kept
    inputs: Outliers
    weights: Outliers
    granularities: dict[str, float]  # relative output error with one scale per tensor, row and group, 4 bits
    losses: dict[Scheme, Loss]

    @property
    def kl(self) -> float:
        """By the recipe's own scheme, predicted, in nats."""
        return self.losses[self.assigned].kl if self.assigned else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "linear": self.name,
            "shape": [self.m, self.n],
            "inputs": self.inputs._asdict(),
            "weights": self.weights._asdict(),
            "granularities": self.granularities,
            "schemes": {str(scheme): loss._asdict() for scheme, loss in self.losses.items()},
        }


@dataclass(frozen=True)
class Isolated:
    """One layer quantized by itself, as the recipe says: KL in nats, predicted from moments and measured."""

    layer: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class Sensitivity:
    """All linears of a model."""

    groups: tuple[tuple[LinearSensitivity, ...], ...]  # linears that share an input together, in forward order
    tokens: int
    sequences: int
    isolated: tuple[Isolated, ...] = ()

    @property
    def linears(self) -> list[LinearSensitivity]:
        return [linear for group in self.groups for linear in group]

    @property
    def correlation(self) -> float | None:
        """Between predicted and measured KL over layers (Pearson); None where nothing was measured."""
        if len(self.isolated) < 2:
            return None
        pairs = torch.tensor([(each.predicted, each.measured) for each in self.isolated])
        return float(torch.corrcoef(pairs.T)[0, 1])

    def to_dict(self) -> dict[str, Any]:
        facts = {"tokens": self.tokens, "sequences": self.sequences, "correlation": self.correlation}
        isolated = [asdict(each) for each in self.isolated]
        return facts | {"linears": [linear.to_dict() for linear in self.linears], "isolated": isolated}


def measure(
    recipe: Recipe,
    shell: Shell,
    batches: tuple[Batch, ...],
    *,
    isolated: bool = False,
    noticed: Noticed = unnoticed,
) -> Sensitivity:
    """From the first `SEQUENCES` batches, the losses of all schemes as symmetric as the recipe's own.

    Raises:
        CalibrationError: there is one sequence only.
        RecipeError: the model is a mixture of experts.
        NumericsError: NaN or Inf in weights or activations.
        OutputError: the states do not fit on the disk for temporary files.
    """
    layout = derive_layout(shell.config, trust_remote_code=shell.source.trust_remote_code)
    if any(layer.mixture for layer in layout.layers):
        raise RecipeError("sensitivity: is not measured for mixtures of experts; quantize with one scheme")
    batches = batches[:SEQUENCES]
    if len(batches) < 2:
        raise CalibrationError("calibration: schemes are judged by sequences held out; give at least two")
    judging = range(len(batches) - 1, -1, -JUDGING)
    trip = RoundTrip(shell, layout.layers, batches, judging, spill=_spill(shell, layout, batches))
    sensors: dict[Group, Sensor] = {}

    def visit(tap: Tap) -> None:
        if tap.group not in sensors:
            m, n = sum(layout.shapes[name][0] for name in tap.group.linears), tap.x.shape[1]
            sensors[tap.group] = Sensor(m, n, tap.x.device)
        if tap.gradient is None:
            sensors[tap.group].fit(tap.x, None if tap.group.norm else tap.size)
        else:
            sensors[tap.group].judge(tap.x, tap.gradient)

    groups: list[tuple[LinearSensitivity, ...]] = []
    alone: list[Isolated] = []
    for left, layer in zip(reversed(range(len(layout.layers))), trip.backward(visit, recipe.seed), strict=True):
        trials = {group: trial(group, sensors[group], shell) for group in layer.groups}
        found = [_linears(layer, group, trials[group], sensors[group], recipe, layout) for group in layer.groups]
        sensors.clear()
        if isolated:
            chosen = {linear.name: linear.assigned for group in found for linear in group}
            method = "gptq" if recipe.calibrated else "rtn"
            weights = quantized(trials.values(), chosen, choices(recipe), method)
            predicted = sum(linear.kl for group in found for linear in group)
            alone.append(Isolated(layer.name, predicted, isolated_kl(trip, layer, weights)))
        groups = found + groups
        noticed(layer.name, left)
    return Sensitivity(tuple(groups), trip.tokens, len(batches), tuple(reversed(alone)))


def trial(group: Group, sensor: Sensor, shell: Shell) -> Trial:
    weights = {name: shell.read(f"{name}.weight").to(shell.device).float() for name in group.linears}
    return Trial(weights, sensor.inputs.H(group.linears[0]), *sensor.curvature(group.linears[0]))


def choices(recipe: Recipe) -> Choices:
    """The solver's, without what needs the activations of a quantized model."""
    solver = recipe.solver
    return Choices(solver.order, solver.weight, solver.damping, solver.shrinkage)


def _linears(
    layer: Layer, group: Group, trial: Trial, sensor: Sensor, recipe: Recipe, layout: Layout
) -> tuple[LinearSensitivity, ...]:
    """All that is to be said of linears that share an input."""
    _, n = layout.shapes[group.linears[0]]
    symmetric = recipe.scheme.symmetric
    schemes = [Scheme(bits, g, symmetric) for bits in BITS for g in GROUP_SIZES if g == -1 or n % g == 0]
    assigned = {linear.name: linear.scheme for linear in assign(group, recipe, layout)}
    schemes += [scheme for scheme in set(assigned.values()) if scheme and scheme not in schemes]
    losses = trial.losses(schemes, choices(recipe), calibrated=recipe.calibrated)
    granularities = trial.granularities(4, symmetric=symmetric)
    return tuple(
        LinearSensitivity(
            name,
            layer.name,
            *layout.shapes[name],
            assigned[name],
            sensor.channels.outliers(),
            outliers(trial.weights[name]),
            granularities[name],
            {scheme: losses[scheme][name] for scheme in schemes},
        )
        for name in group.linears
    )


def _spill(shell: Shell, layout: Layout, batches: tuple[Batch, ...]) -> Path | None:
    """Where the states before all layers go if they are many: where the system keeps temporary files."""
    tokens = sum(batch.mask.numel() for batch in batches)
    size = tokens * shell.config.hidden_size * shell.dtype.itemsize * len(layout.layers)
    return Path(tempfile.gettempdir()) if size >= SPILL_BYTES else None
