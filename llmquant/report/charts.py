"""The geometry of the page's charts: numbers to rectangles. Colours are the style sheet's, light or dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmquant.report.facts import Linear

LEFT, TOP, WIDTH = 128, 8, 720  # of the plot inside of the drawing, in its own units
ROW, BARS, AXIS = 24, 150, 26  # heights: of a row of a map, of the bars, of the numbers below
STEPS = 8  # shades of a map


@dataclass(frozen=True)
class Box:
    """A rectangle, what it is called when pointed at, and its class in the style sheet."""

    x: float
    y: float
    width: float
    height: float
    title: str
    shade: str
    text: str = ""


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Chart:
    """One drawing with all that a reader needs who does not see it."""

    name: str
    caption: str
    height: float
    boxes: tuple[Box, ...]
    rows: tuple[Label, ...]
    columns: tuple[Label, ...]
    lines: tuple[Label, ...] = ()  # across the plot, with their values
    legend: tuple[tuple[str, str], ...] = ()  # shade and meaning

    @property
    def width(self) -> float:
        return LEFT + WIDTH + 8


def error_bars(linears: Sequence[Linear], layers: Sequence[int]) -> Chart | None:
    """The mean relative error of each layer's linears; None where none is known."""
    means = {
        layer: sum(errors) / len(errors)
        for layer in layers
        if (errors := [x.error for x in linears if x.layer == layer and x.error is not None])
    }
    most = max(means.values(), default=0.0)
    if most <= 0:
        return None
    step = _round_up(most / 4)
    scale = BARS / (4 * step)
    place = _columns(layers)
    boxes = tuple(
        Box(x, TOP + BARS - mean * scale, width, mean * scale, f"layer {layer}: {mean:.2e}", "bar")
        for layer, mean in means.items()
        for x, width in [place(layer)]
    )
    lines = tuple(Label(LEFT - 8, TOP + BARS - i * step * scale, f"{i * step:.3g}") for i in range(5))
    return Chart(
        "errors",
        "Relative error at the outputs of each layer's linears, mean",
        TOP + BARS + AXIS,
        boxes,
        (),
        _numbers(layers, TOP + BARS + 18),
        lines,
    )


def bits_map(linears: Sequence[Linear], layers: Sequence[int], kinds: Sequence[str]) -> Chart:
    """Which linear has how many bits."""
    shades = {x.scheme: f"bits{x.bits} {' '.join(x.scheme.split()[1:2])}".strip() for x in linears}
    order = sorted(shades, key=lambda scheme: (shades[scheme].partition(" ")[0][4:].zfill(2), len(scheme), scheme))
    legend = tuple((shades[scheme], scheme) for scheme in order)
    cell = lambda x: (shades[x.scheme], f"{x.name}: {x.scheme}", str(x.bits))  # noqa: E731
    return _map("bits", "Bits of each linear", linears, layers, kinds, cell, legend)


def outlier_map(linears: Sequence[Linear], layers: Sequence[int], kinds: Sequence[str]) -> Chart | None:
    """How far each linear's largest input channel is from the median one, on a logarithmic scale."""
    known = [x for x in linears if x.outliers is not None and x.outliers > 0]
    if not known:
        return None
    most = max(math.log10(max(x.outliers or 1.0, 1.0)) for x in known) or 1.0

    def cell(x: Linear) -> tuple[str, str, str]:
        if x.outliers is None:
            return "unknown", f"{x.name}: not measured", ""
        step = min(STEPS - 1, int(STEPS * math.log10(max(x.outliers, 1.0)) / most))
        return f"heat{step}", f"{x.name}: {x.outliers:.3g}", ""

    legend = tuple((f"heat{i}", f"{10 ** (most * i / STEPS):.3g} and more") for i in range(STEPS))
    caption = "Outliers of each linear's inputs: the largest channel over the median channel"
    return _map("outliers", caption, linears, layers, kinds, cell, legend)


def _map(
    name: str,
    caption: str,
    linears: Sequence[Linear],
    layers: Sequence[int],
    kinds: Sequence[str],
    cell: Callable[[Linear], tuple[str, str, str]],
    legend: tuple[tuple[str, str], ...],
) -> Chart:
    """Kinds of linears from top to bottom, layers from left to right."""
    place, boxes = _columns(layers), []
    for linear in linears:
        x, width = place(linear.layer)
        shade, title, text = cell(linear)
        row = TOP + ROW * kinds.index(linear.kind)
        boxes.append(Box(x, row, width, ROW - 2, title, shade, text if width >= 14 else ""))
    rows = tuple(Label(LEFT - 8, TOP + ROW * i + 15, kind.rpartition(".")[2]) for i, kind in enumerate(kinds))
    bottom = TOP + ROW * len(kinds)
    return Chart(name, caption, bottom + AXIS, tuple(boxes), rows, _numbers(layers, bottom + 16), (), legend)


def _columns(layers: Sequence[int]) -> Callable[[int], tuple[float, float]]:
    """From a layer to the left edge and the width of its column."""
    step = WIDTH / max(len(layers), 1)
    return lambda layer: (round(LEFT + step * layers.index(layer), 2), round(step - min(2.0, step / 4), 2))


def _numbers(layers: Sequence[int], y: float) -> tuple[Label, ...]:
    """Every so manieth layer below its column."""
    place, every = _columns(layers), max(1, math.ceil(len(layers) / 20))
    return tuple(Label(place(layer)[0] + place(layer)[1] / 2, y, str(layer)) for layer in layers[::every])


def _round_up(value: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))
