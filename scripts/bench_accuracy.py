"""What each method, scheme and step is worth: perplexity, KL and agreement beside the original model.

    python scripts/bench_accuracy.py MODEL CALIBRATION.jsonl TEXT... [--only headline,methods,...]

What the results file holds already is not measured again. The first text is the measure; the others, far from it and
from the calibration text, are read where methods or calibration texts are compared at 4 bits in groups of 64. Writes a
JSON file, tables and a plot.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant.errors import LlmquantError
from llmquant.evaluate.protocol import Request
from llmquant.evaluate.run import cut_for
from llmquant.evaluate.text import read_file
from llmquant.native import describe_backend
from llmquant.pipeline import Options, quantize
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme

METHODS = ("rtn", "awq", "gptq", "awq+gptq", "auto")
GROUPS = (32, 64, 128, -1)
FAR_SECTIONS = ("methods", "calibration")  # which read the other texts too
FAR_WINDOWS = 2
CLOSE_WINDOWS = 4  # of the first text, where rows are compared with each other
OTHER_BITS = {3: 4, 8: 1}  # and the windows of each: what 8 bits lose is small and hardly varies
OTHER_METHODS, OTHER_GROUPS = ("rtn", "gptq", "auto"), (64, -1)  # of 3 and 8 bits
SEQ_LEN = 2048

Figures = dict[str, float]


class Row(NamedTuple):
    """A line of a table. Rows with equal recipes are measured once."""

    section: str
    name: str
    recipe: dict[str, Any]  # without the calibration text, which nearly all have in common
    windows: int  # of the first text

    @property
    def scheme(self) -> Scheme:
        return Scheme(**self.recipe["scheme"])

    @property
    def far(self) -> bool:
        return self.section in FAR_SECTIONS and (self.scheme.bits, self.scheme.group_size) == (4, 64)


# One step at a time, each on top of the one before it; then single choices that differ from the default.
PLAIN = {"correction": 0.0, "shrinkage": 0.0}
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("round to nearest", {"method": "rtn"}),
    ("GPTQ: static order, grids weighted by diag(H)", {"method": "gptq", "solver": PLAIN | {"order": "static"}}),
    ("+ shrinkage 0.3", {"method": "gptq", "solver": {"correction": 0.0, "order": "static"}}),
    ("+ correction 0.75", {"method": "gptq", "solver": {"order": "static"}}),
    ("+ order by groups, grids chosen in the loop", {"method": "gptq"}),
    ("+ best of AWQ, GPTQ and both (the default)", {}),
    ("+ refit and descent, 2 passes", {"solver": {"refine": 2}}),
    ("default, correction 1.0", {"solver": {"correction": 1.0}}),
    ("default, static order", {"solver": {"order": "static"}}),
    ("default without correction", {"solver": {"correction": 0.0}}),
    ("GPTQ without correction (the preset fast)", {"preset": "fast"}),
    ("default, damping 0.1", {"solver": {"damping": 0.1}}),
    (
        "GPTQ: static order, grids weighted by 1/U_jj^2",
        {"method": "gptq", "solver": PLAIN | {"order": "static", "weight": "pivot"}},
    ),
    ("AWQ, scales by the Gram form", {"method": "awq"}),
    ("AWQ, scales by the block's output", {"method": "awq", "solver": {"awq_loss": "block"}}),
    ("default + 1 pass of them + trained rounding (the preset best)", {"preset": "best"}),
]


def planned(calibration: str, headline: int) -> Iterator[Row]:
    """All rows, those that say most first."""
    for symmetric in (True, False):
        for name, recipe in (("round to nearest", {"method": "rtn"}), ("default", {})):
            yield Row("headline", name, recipe | {"scheme": {"group_size": 64, "symmetric": symmetric}}, headline)
    yield from each_method("methods", 4, True, CLOSE_WINDOWS, METHODS, GROUPS)
    for name, step in STEPS:
        yield Row("ablation", name, step | {"scheme": {"group_size": 64}}, CLOSE_WINDOWS)
    for source in ("self", "builtin", calibration):
        recipe = {"calibration": {"source": source}, "scheme": {"group_size": 64}}
        yield Row("calibration", Path(source).name, recipe, CLOSE_WINDOWS)
    yield from each_method("methods", 4, False, CLOSE_WINDOWS, METHODS, GROUPS)
    for symmetric in (True, False):
        yield Row("best", "best", {"preset": "best", "scheme": {"group_size": 64, "symmetric": symmetric}}, headline)
    for bits, count in OTHER_BITS.items():
        for symmetric in (True, False):
            yield from each_method("bits", bits, symmetric, count, OTHER_METHODS, OTHER_GROUPS)


def each_method(
    section: str, bits: int, symmetric: bool, count: int, methods: tuple[str, ...], groups: tuple[int, ...]
) -> Iterator[Row]:
    for group_size in groups:
        scheme = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
        for method in methods:
            yield Row(section, method, {"method": method, "scheme": scheme}, count)


def first_windows(model: Path, path: Path, count: int) -> Tensor:
    """Token ids [w, T]."""
    text = cut_for(model, read_file(path), Request(seq_len=SEQ_LEN, max_windows=count), torch.float32)
    return torch.stack([window.ids for window in text.windows])


class Reference:
    """The original model on one text: its log-probabilities are computed once and kept."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.ids = ids
        self.logp = [_logits(model, window).log_softmax(-1) for window in ids]

    def measure(self, model: PreTrainedModel, count: int) -> list[Figures]:
        """For each of the first windows the means over its tokens: negative log-likelihood in nats, of the original
        too; KL(original || model) in nats; how often both would choose the same token."""
        return [self._measure(model, *window) for window in zip(self.ids[:count], self.logp, strict=False)]

    def _measure(self, model: PreTrainedModel, ids: Tensor, reference: Tensor) -> Figures:
        sums = torch.zeros(4, dtype=torch.float64)
        parts = (tokens.split(32) for tokens in (_logits(model, ids), reference, ids[1:, None]))
        for logits, logp, next_token in zip(*parts, strict=True):  # a few at a time: they stay in cache
            logq = logits.log_softmax(-1)
            same = (logq.argmax(-1) == logp.argmax(-1)).float()
            kl = (logp.exp() * (logp - logq)).sum(-1)
            each = (-logq.gather(1, next_token), -logp.gather(1, next_token), kl, same)
            sums += torch.stack([figure.sum(dtype=torch.float64) for figure in each])
        return dict(zip(("nll", "original", "kl", "top1"), (sums / len(reference)).tolist(), strict=True))


def summary(measured: list[Figures], count: int) -> Figures:
    """Over the first windows: perplexity, that of the original, mean KL and agreement."""
    mean = {name: statistics.fmean(window[name] for window in measured[:count]) for name in measured[0]}
    return mean | {"perplexity": math.exp(mean["nll"]), "original": math.exp(mean["original"])}


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()


def complete(row: Row, args: argparse.Namespace) -> Recipe:
    common = {"source": str(args.calibration), "samples": args.samples, "seq_len": args.seq_len}
    return Recipe.from_dict(row.recipe | {"calibration": common | row.recipe.get("calibration", {})})


def key(recipe: Recipe) -> str:
    """What two rows have in common that need to be measured once only."""
    values = recipe.model_dump(mode="json", exclude={"preset"})
    values["calibration"]["source"] = Path(recipe.calibration.source).name
    return json.dumps(values, sort_keys=True)


def perform(recipe: Recipe, args: argparse.Namespace, counts: dict[str, int], references: dict[str, Reference]) -> Any:
    """Quantize, and read so many windows of each text."""
    options = Options(overwrite=True)
    with tempfile.TemporaryDirectory() as out:
        started, used = time.perf_counter(), time.process_time()
        plan = quantize(args.model, out, recipe, options)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
        model = load(out, torch.float32)
    return {
        "bits_per_weight": plan.bits_per_weight(),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "threads": torch.get_num_threads(),
        "backend": describe_backend(),
        "activations": str(options.compute_dtype),
        "texts": {name: references[name].measure(model, count) for name, count in counts.items() if count},
    }


def tables(rows: list[tuple[Row, dict[str, Any]]], text: str) -> str:
    """Every result of each section as a row."""
    lines = []
    for section in dict.fromkeys(row.section for row, _ in rows):
        columns = ("", "scheme", "bits", "windows", "original", "perplexity", "KL", "same first choice", "CPU seconds")
        lines += [f"\n## {section}\n", _row(*columns), "|---" * len(columns) + "|"]
        for row, result in rows:
            if row.section == section:
                found = summary(result["texts"][text], row.windows)
                figures = (f"{found['original']:.2f}", f"{found['perplexity']:.2f}", f"{found['kl']:.4f}")
                size, seconds = f"{result['bits_per_weight']:.2f}", f"{result['cpu_seconds']:.0f}"
                lines.append(_row(row.name, row.scheme, size, row.windows, *figures, f"{found['top1']:.1%}", seconds))
    far = [(row, result["texts"]) for row, result in rows if row.far and len(result["texts"]) > 1]
    if far:
        names = list(far[0][1])
        lines += ["\n## KL on other texts\n", _row("", "scheme", *names), "|---" * (len(names) + 2) + "|"]
        for row, texts in far:
            values = (f"{summary(texts[name], FAR_WINDOWS)['kl']:.4f}" for name in names)
            lines.append(_row(row.name, row.scheme, *values))
    return "\n".join(lines).strip() + "\n"


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def plot(rows: list[tuple[Row, dict[str, Any]]], text: str, path: Path) -> None:
    """KL against bits per weight, a line for each method; asymmetric 32-groups left out, see docs/accuracy.md."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "llmquant"  # the same results give the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, symmetric in zip(axes, (True, False), strict=True):
        for method in METHODS:
            points = sorted(
                (result["bits_per_weight"], summary(result["texts"][text], row.windows)["kl"])
                for row, result in rows
                if (row.section, row.name, row.scheme.symmetric) == ("methods", method, symmetric)
                and (symmetric or row.scheme.group_size != 32)
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
        axis.set(title="symmetric" if symmetric else "asymmetric", xlabel="bits per weight", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL from the original, nats")
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--headline", type=int, default=24, help="windows of the headline figures")
    parser.add_argument("--only", default="headline,methods,ablation,calibration,best,bits")
    parser.add_argument("--out", type=Path, default=Path("docs/results/accuracy.json"))
    args = parser.parse_args()

    results: dict[str, Any] = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
    first = args.texts[0].name
    rows = [(row, complete(row, args)) for row in planned(str(args.calibration), args.headline)]
    todo: dict[str, tuple[Row, Recipe, dict[str, int]]] = {}
    for row, recipe in rows:
        same = [other for other, its in rows if key(its) == key(recipe)]
        counts = {path.name: FAR_WINDOWS * any(other.far for other in same) for path in args.texts}
        counts[first] = max(other.windows for other in same)
        if row.section in args.only.split(",") and not holds(results.get(key(recipe)), counts):
            todo.setdefault(key(recipe), (row, recipe, counts))
    if todo:
        most = {path.name: max(counts[path.name] for *_, counts in todo.values()) for path in args.texts}
        references = read_references(args.model, {path: most[path.name] for path in args.texts})
    for number, (name, (row, recipe, counts)) in enumerate(todo.items(), 1):
        try:
            results[name] = perform(recipe, args, counts, references)
        except LlmquantError as error:
            print(f"{row.section}: {row.name}, {row.scheme}: {error}", flush=True)
            continue
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")
        found, seconds = summary(results[name]["texts"][first], row.windows), results[name]["seconds"]
        figures = f"perplexity {found['perplexity']:.3f}, KL {found['kl']:.4f}, {seconds} s"
        print(f"{number}/{len(todo)} {row.section}: {row.name}, {row.scheme}: {figures}", flush=True)

    measured = [
        (row, results[key(recipe)]) for row, recipe in rows if holds(results.get(key(recipe)), {first: row.windows})
    ]
    args.out.with_suffix(".md").write_text(f"# Results of scripts/bench_accuracy.py\n\n{tables(measured, first)}")
    if any(row.section == "methods" for row, _ in measured):
        plot(measured, first, args.out.with_suffix(".svg"))


def holds(result: dict[str, Any] | None, counts: dict[str, int]) -> bool:
    """Whether so many windows of each text have been read."""
    return result is not None and all(len(result["texts"].get(name, ())) >= count for name, count in counts.items())


def read_references(model: Path, counts: dict[Path, int]) -> dict[str, Reference]:
    original = load(model, torch.float32)
    return {
        path.name: Reference(original, first_windows(model, path, count)) for path, count in counts.items() if count
    }


if __name__ == "__main__":
    main()
