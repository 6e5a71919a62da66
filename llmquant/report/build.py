"""Facts to a page."""

from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from llmquant.checkpoint import durable
from llmquant.display import duration
from llmquant.manifest import REPORT
from llmquant.report.charts import Chart, bits_map, error_bars, outlier_map
from llmquant.report.facts import Facts, Linear, read_facts
from llmquant.version import __version__

UNITS = {"mean_kl": "nats", "median_kl": "nats", "p99_kl": "nats", "max_kl": "nats"}
FEW_TOKENS = 128  # for one expert: its solution rests on its guests as much as on them
SHARES = ("top1_agreement", "increase")  # figures that are shown in per cent


class Card(NamedTuple):
    """One number of the summary."""

    name: str
    value: str
    note: str = ""


class Page(NamedTuple):
    """What the template shows."""

    title: str
    lead: str
    cards: list[Card]
    quality: dict[str, str]
    protocol: str
    charts: list[Chart]
    linears: list[Linear]
    sequences: int
    tokens: dict[str, int]
    notes: list[str]
    cost: dict[str, str]
    recipe: str
    manifest: str
    environment: dict[str, str]
    version: str = __version__


def write_report(directory: str | Path, evaluation: Path | None = None, out: Path | None = None) -> Path:
    """Write `report.html` into a finished directory, or to `out`; returns its path.

    The page stands beside the checkpoint and is no part of it: SHA256SUMS does not list it, since it shows times.

    Raises:
        LlmquantError: the directory is not what `llmquant quantize` finished, or cannot be written.
    """
    path = out or Path(directory) / REPORT
    durable.write_file(path, [render(read_facts(Path(directory), evaluation)).encode()])
    return path


def render(facts: Facts) -> str:
    """The page; equal facts give equal bytes."""
    files = resources.files("llmquant.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string((files / "page.html").read_text(encoding="utf-8"))
    style = Markup((files / "page.css").read_text(encoding="utf-8").rstrip())  # noqa: S704  (ours, from this package)
    return template.render(page=page_of(facts), style=style) + "\n"


def page_of(facts: Facts) -> Page:
    origin, head = facts.head.get("origin", {}), facts.head
    name = origin.get("name") or facts.directory
    layers = len(facts.layers)
    kept = sum(linear.scheme == "kept" for linear in facts.linears)
    lead = f"{origin.get('model_type', 'A')} model, {layers} layers, {len(facts.linears) - kept} linears quantized"
    return Page(
        title=str(name),
        lead=f"{lead}{f', {kept} kept' if kept else ''}: {facts.summary['schemes']}.",
        cards=_cards(facts),
        quality={_spoken(key): _figure(key, value) for key, value in _figures(facts.evaluation).items()},
        protocol=str(facts.evaluation.get("protocol", "")),
        charts=_charts(facts),
        linears=facts.rows,
        sequences=head.get("sequences", 0),
        tokens=head.get("calibration_tokens", {}),
        notes=[*map(str, head.get("notes", [])), *_experts(facts)],
        cost=_cost(facts),
        recipe=facts.recipe.rstrip(),
        manifest=facts.manifest.rstrip(),
        environment={str(key): str(value) for key, value in head.get("environment", {}).items()},
    )


def _cards(facts: Facts) -> list[Card]:
    run, measured = facts.head.get("run", {}), facts.evaluation
    before = run.get("bytes_in")
    ratio = f"{before / facts.summary['bytes']:.1f} times smaller than {_size(before)}" if before else ""
    cards = [
        Card("bits per weight", f"{facts.summary['bits_per_weight']:.2f}", "of quantized linears, scales included"),
        Card("size", _size(facts.summary["bytes"]), ratio),
    ]
    if "perplexity" in measured:
        beside = f"original {measured['baseline_perplexity']:.2f}" if "baseline_perplexity" in measured else ""
        cards.append(Card("perplexity", f"{measured['perplexity']:.2f}", beside))
    if "mean_kl" in measured:
        cards.append(Card("mean KL divergence", f"{measured['mean_kl']:.4f}", "nats, from the original"))
    if "seconds" in run:
        cards.append(Card("time", duration(run["seconds"]), f"peak memory {_size(run['peak_memory'])}"))
    return cards


def _figures(evaluation: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in evaluation.items() if type(value) in (int, float)}


def _spoken(key: str) -> str:
    return key.replace("_", " ").replace("kl", "KL").replace("top1", "top-1")


def _figure(key: str, value: float) -> str:
    if key in SHARES or key.endswith("overlap"):
        return f"{value:.2%}"
    return f"{value:.5g} {UNITS.get(key, '')}".rstrip()


def _charts(facts: Facts) -> list[Chart]:
    linears, layers, kinds = facts.rows, facts.layers, facts.kinds
    drawn = [error_bars(linears, layers), bits_map(linears, layers, kinds), outlier_map(linears, layers, kinds)]
    return [chart for chart in drawn if chart]


def _experts(facts: Facts) -> list[str]:
    """How evenly the calibration text reached the experts, of which those that it hardly did are known least."""
    downs = [linear for linear in facts.linears if linear.kind.endswith(".down_proj")]  # one of each
    tokens = [linear.tokens for linear in downs if linear.tokens is not None]
    if not any(tokens):
        return []
    few = sum(count < FEW_TOKENS for count in tokens)
    spread = f"{min(tokens)} to {max(tokens)}, median {median(tokens):.0f}"
    return [f"{len(tokens)} experts: calibration tokens for each: {spread}; {few} have fewer than {FEW_TOKENS}"]


def _cost(facts: Facts) -> dict[str, str]:
    run = facts.head.get("run", {})
    cost = {"solving, all linears": duration(sum(linear.seconds for linear in facts.linears))}
    if "seconds" in run:
        cost = {"whole run, from opening to verified files": duration(run["seconds"])} | cost
        cost["peak memory"] = f"{_size(run['peak_memory'])} (planned for: {_size(run['planned_memory'])})"
    slowest = max(facts.linears, key=lambda linear: linear.seconds)
    return cost | {"slowest linear": f"{slowest.name}, {slowest.seconds:.2f} s"}


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
