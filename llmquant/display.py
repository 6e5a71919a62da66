"""What a person sees while and after a run. Progress goes to stderr, tables too: stdout is for results."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from llmquant.calibration.batches import Calibration
    from llmquant.plan import Plan, Unit

console = Console(stderr=True, highlight=False)
results = Console(highlight=False)  # stdout


class Display:
    """The observer that draws: a bar on a terminal, one line per layer elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.fields[where]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._sensing: TaskID | None = None
        self._last: list[dict[str, Any]] = []

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def sensed(self, layer: str, left: int) -> None:
        if self._sensing is None:
            console.print("sensitivity: once through the model and back")
            self._sensing = self._progress.add_task("", total=left + 1, where="", detail="sensitivity")
            self._progress.start()
        self._progress.update(self._sensing, advance=1, where=layer, visible=left > 0)

    def planned(self, plan: "Plan", calibration: "Calibration | None", done: int) -> None:
        show_plan(plan)
        if calibration:
            counts = ", ".join(f"{source} {count}" for source, count in calibration.tokens.items())
            total = sum(calibration.tokens.values())
            console.print(f"calibration: {calibration.sequences} sequences, {total} tokens ({counts})")
            for note in calibration.notes:
                console.print(f"calibration: {note}")
        if done:
            console.print(f"resuming: {done} of {len(plan.units)} units are finished, replaying them")
        self._task = self._progress.add_task("", total=len(plan.units), where="", detail="")
        self._progress.start()

    def solved(self, record: dict[str, Any]) -> None:
        self._last.append(record)
        if record["rung"] not in ("none", "fp32"):
            console.print(f"{record['module']}: Hessian not positive definite; {record['rung']} was used instead")
        detail = f"{record['module'].rpartition('.')[2]} error {record['error']:.2e}  {_memory()}"
        self._progress.update(self._task, where=record["module"].partition(".self")[0], detail=detail)

    def finished(self, unit: "Unit") -> None:
        self._progress.advance(self._task)
        if not console.is_terminal and self._last:
            worst = max(self._last, key=lambda record: record["error"])
            seconds = sum(record["seconds"] for record in self._last)
            seen = [record["tokens"] for record in self._last if "expert" in record]
            experts = f", {min(seen)} to {max(seen)} tokens for an expert" if any(seen) else ""
            console.print(
                f"{unit.name}: {len(self._last)} linears in {seconds:.1f} s, "
                f"worst {worst['module'].rpartition('.')[2]} error {worst['error']:.2e}{experts}, {_memory()}"
            )
        self._last.clear()


@contextmanager
def progress(words: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, which is told each part of the work that is done; the parts add up to 1."""
    columns = TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")
    rest = TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()
    with Progress(*columns, *rest, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(words, total=1.0)
        yield lambda part: bar.advance(task, part)


def show_plan(plan: "Plan", to: Console = console) -> None:
    """The plan, in a few lines."""
    rows = {
        "model": f"{plan.model_type}, {len(plan.layers)} layers, {len(plan.linears)} linears",
        "method": f"{plan.recipe.method}, {plan.recipe.scheme}, format {plan.recipe.format}",
        "quantized": f"{len(plan.schemes)} linears at {plan.bits_per_weight():.2f} bits per weight",
        "size": f"{plan.bytes_in / 1e6:.1f} MB -> {plan.bytes_out / 1e6:.1f} MB",
        "memory": f"up to {plan.estimate.memory / 1e9:.1f} GB",
        "time": f"about {duration(plan.estimate.seconds)} for {plan.estimate.tokens} calibration tokens",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in rows.items():
        table.add_row(f"[bold]{key}", value)
    to.print(table)
    for note in plan.notes:
        to.print(f"note: {note}", soft_wrap=True)


def show_table(rows: dict[str, Any]) -> None:
    """A two-column table of results."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in rows.items():
        table.add_row(f"[bold]{key}", str(value))
    results.print(table)


def print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _memory() -> str:
    return f"{psutil.Process().memory_info().rss / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """In words, as exact as it matters."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
