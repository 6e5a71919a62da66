"""Several checkpoints side by side on one text: what each takes, what it lost, how fast it is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from llmquant.bench.generate import OfTransformers, measure
from llmquant.checkpoint.reader import Checkpoint
from llmquant.display import results
from llmquant.errors import RecipeError
from llmquant.evaluate.divergence import compare_all
from llmquant.evaluate.fit import check_tokenizers, open_models
from llmquant.evaluate.protocol import Request
from llmquant.evaluate.run import Evaluation, alone, beside, cut_for
from llmquant.evaluate.text import Source
from llmquant.inspect import inspect_checkpoint
from llmquant.memory import return_large_blocks
from llmquant.model.shell import read_config
from llmquant.model.tokenizer import load_tokenizer
from llmquant.runtime.loader import load

PROMPT, WRITTEN = 128, 32  # tokens that speed is measured with


@dataclass(frozen=True)
class Entry:
    """A checkpoint and its figures. Bits are those of the quantized linears, or of all weights if none is quantized."""

    name: str
    bytes: int
    bits_per_weight: float
    found: Evaluation
    prompt_per_second: float | None = None
    new_per_second: float | None = None

    @property
    def point(self) -> tuple[float, float] | None:
        """Bits and mean KL; None for the baseline."""
        return (self.bits_per_weight, self.found.divergence.mean_kl) if self.found.divergence else None

    def to_dict(self) -> dict[str, Any]:
        facts = {key: value for key, value in asdict(self).items() if key != "found"}
        return self.found.to_dict() | facts


def compare_checkpoints(
    directories: Sequence[Path],
    source: Source,
    request: Request,
    *,
    baseline: Path | None = None,
    dtype: torch.dtype = torch.float32,
    max_memory: int | None = None,
    speed: bool = True,
    noticed: Callable[[float], None] = lambda part: None,
    device: str = "cpu",
) -> list[Entry]:
    """Each checkpoint beside `baseline`, which is the first of them if not given and then has no divergence.

    Raises:
        RecipeError: there is nothing to compare, or no text; else what `evaluate` raises.
    """
    return_large_blocks()
    reference = baseline or directories[0]
    others = [directory for directory in directories if directory != reference]
    if not others:
        raise RecipeError("compare: give at least two checkpoints, or one and --baseline")
    text = source.read()
    for directory in others:
        check_tokenizers(directory, load_tokenizer(directory), reference, text.content)
    windows = cut_for(reference, text, request, dtype)
    original, *models = open_models([reference, *others], windows, dtype, max_memory, noticed, device)
    both = compare_all(models, original, windows)
    del original, models
    found = {reference: alone(reference, both[0].baseline)}
    found |= {directory: beside(directory, each) for directory, each in zip(others, both, strict=True)}
    speed_on = device if speed else None
    return [_entry(directory, found[directory], speed_on) for directory in dict.fromkeys((reference, *directories))]


def _entry(directory: Path, found: Evaluation, speed_on: str | None) -> Entry:
    facts = inspect_checkpoint(directory)
    entry = Entry(str(directory), facts["bytes"], facts["bits_per_weight"] or 0.0, found)
    if speed_on is None:
        return entry
    vocab = int(read_config(Checkpoint.open(directory)).vocab_size)
    (result,) = measure({entry.name: OfTransformers(load(directory, device=speed_on))}, PROMPT, WRITTEN, vocab)
    speed = result.prompt_per_second, result.new_per_second
    return Entry(entry.name, entry.bytes, entry.bits_per_weight, found, *speed)


def pareto(entries: Sequence[Entry]) -> dict[str, tuple[float, float]]:
    """Those that no other beats, fewer bits with as little KL or less KL with as few bits; by rising bits."""
    front: dict[str, tuple[float, float]] = {}
    least = math.inf
    for name, point in sorted(points(entries).items(), key=lambda item: item[1]):
        if point[1] < least:
            front[name], least = point, point[1]
    return front


def points(entries: Sequence[Entry]) -> dict[str, tuple[float, float]]:
    return {entry.name: entry.point for entry in entries if entry.point}


def plot(entries: Sequence[Entry], path: Path) -> None:
    """Mean KL against bits per weight, with the Pareto front; PNG, SVG or PDF by the name of the file.

    Raises:
        RecipeError: matplotlib is not installed, or cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RecipeError(f"--plot {path}: needs matplotlib; pip install 'llmquant[bench]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*pareto(entries).values(), strict=True), color="#4477aa", label="Pareto front")
    axes.scatter(*zip(*points(entries).values(), strict=True), color="#222222", zorder=3)
    for name, point in points(entries).items():
        axes.annotate(Path(name).name, point, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="bits per weight", ylabel="mean KL from the baseline, nats", ylim=(0, None))
    axes.set_title(str(entries[0].found.perplexity.protocol), fontsize=7)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=160)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--plot {path}: cannot be written ({error}); name a .png, .svg or .pdf") from error


def show_comparison(entries: Sequence[Entry]) -> None:
    """A table on stdout; what is on the Pareto front is bold."""
    table = Table(caption=str(entries[0].found.perplexity.protocol))
    for column in ("checkpoint", "MB", "bits", "perplexity", "mean KL", "same first", "prompt/s", "new/s"):
        table.add_column(column, justify="left" if column == "checkpoint" else "right")
    front = pareto(entries)
    for entry in entries:
        moved = entry.found.divergence
        row = (
            entry.name,
            f"{entry.bytes / 1e6:.1f}",
            f"{entry.bits_per_weight:.2f}",
            f"{entry.found.perplexity.value:.2f}",
            f"{moved.mean_kl:.4f}" if moved else "",
            f"{moved.top1_agreement:.1%}" if moved else "",
            f"{entry.prompt_per_second:.0f}" if entry.prompt_per_second else "",
            f"{entry.new_per_second:.1f}" if entry.new_per_second else "",
        )
        table.add_row(*row, style="bold" if entry.name in front else None)
    results.print(table)
