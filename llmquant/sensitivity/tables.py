"""What a person sees of a sensitivity analysis."""

from collections import defaultdict

from rich.markup import escape
from rich.table import Table

from llmquant.display import results
from llmquant.plan import stored_bits
from llmquant.scheme import Scheme
from llmquant.sensitivity.measure import LinearSensitivity, Sensitivity
from llmquant.sensitivity.mixed import Mixture

WORST = 10  # linears that are shown one by one
BAR = 24  # characters of the longest bar


def show_sensitivity(found: Sensitivity, mixture: Mixture | None) -> None:
    results.print(uniform_table(found))
    results.print(layer_table(found))
    results.print(linear_table(found))
    if found.correlation is not None:
        results.print(f"correlation of predicted and measured KL over layers: {found.correlation:.3f}")
    if mixture:
        results.print(str(mixture), soft_wrap=True)
        results.print(escape(mixture.recipe.to_yaml()), soft_wrap=True)


def uniform_table(found: Sensitivity) -> Table:
    """One scheme for all linears; for those that its groups do not divide, the next smaller one."""
    table = Table("scheme for all", "bits per weight", "predicted KL", box=None, title="Uniform precision")
    for scheme in sorted({scheme for linear in found.linears for scheme in linear.losses}, key=_by_size):
        own = [(linear, _nearest(linear, scheme)) for linear in found.linears]
        stored = sum(stored_bits(linear.m, linear.n, each, "compressed-tensors") for linear, each in own)
        weights = sum(linear.m * linear.n for linear in found.linears)
        kl = sum(linear.losses[each].kl for linear, each in own)
        table.add_row(str(scheme), f"{stored / weights:.3f}", f"{kl:.4f}")
    return table


def layer_table(found: Sensitivity) -> Table:
    """Predicted KL of each layer by the recipe's scheme, and the measured one beside it."""
    by_layer: dict[str, float] = defaultdict(float)
    worst: dict[str, LinearSensitivity] = {}
    for linear in found.linears:
        by_layer[linear.layer] += linear.kl
        worst[linear.layer] = max(worst.get(linear.layer, linear), linear, key=lambda each: each.kl)
    measured = {each.layer: f"{each.measured:.5f}" for each in found.isolated}
    columns = ["layer", "predicted KL", *(["measured KL"] if measured else []), "", "most of it"]
    table = Table(*columns, box=None, title="By layer, as the recipe has it")
    most = max(by_layer.values()) or 1.0
    for name, kl in by_layer.items():
        bar = "█" * round(BAR * kl / most)
        own = [measured[name]] if measured else []
        table.add_row(escape(name), f"{kl:.5f}", *own, bar, escape(worst[name].name.removeprefix(f"{name}.")))
    return table


def linear_table(found: Sensitivity) -> Table:
    """The linears that lose most: errors with one scale for all, for each row and for each group; and outliers, as the
    largest channel's maximum over the median channel's, and as kurtosis."""
    table = Table(
        box=None, title=f"The {WORST} that lose most: errors rounded to 4 bits, outliers of inputs and weights"
    )
    table.add_column("linear", no_wrap=True)
    for column in ("KL", "tensor", "channel", "group", "inputs", "kurtosis", "weights", "kurtosis"):
        table.add_column(column, justify="right")
    for linear in sorted(found.linears, key=lambda each: -each.kl)[:WORST]:
        errors = list(linear.granularities.values())
        scales = (f"{errors[i]:.3f}" for i in (0, 1, -1))
        outliers = (f"{number:.0f}" for each in (linear.inputs, linear.weights) for number in each[:2])
        table.add_row(escape(linear.name), f"{linear.kl:.4f}", *scales, *outliers)
    return table


def _by_size(scheme: Scheme) -> tuple[int, int]:
    return scheme.bits, -scheme.group_size if scheme.group_size > 0 else -(1 << 30)


def _nearest(linear: LinearSensitivity, scheme: Scheme) -> Scheme:
    """The scheme itself, or what `assign` would make of it for this shape."""
    fitting = [s for s in linear.losses if (s.bits, s.symmetric) == (scheme.bits, scheme.symmetric)]
    smaller = [s for s in fitting if 0 < s.group_size <= scheme.group_size]
    return scheme if scheme in linear.losses else max(smaller, key=lambda s: s.group_size, default=fitting[0])
