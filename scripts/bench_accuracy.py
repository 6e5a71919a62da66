"""What each method, scheme and step is worth: perplexity, KL and agreement beside the original model.

    python scripts/bench_accuracy.py MODEL CALIBRATION.jsonl TEXT... [--only methods,ablation,calibration]

Runs that the results file holds already are not repeated. The first text is the measure; the others, far from it and
from the calibration text, are read where methods or calibration texts are compared at 4 bits in groups of 64. Writes a
JSON file, tables and a plot.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant.errors import LlmquantError
from llmquant.evaluate.perplexity import windows
from llmquant.evaluate.text import read_text
from llmquant.model.tokenizer import load_tokenizer
from llmquant.pipeline import Options, quantize
from llmquant.recipe import Recipe
from llmquant.runtime.loader import load
from llmquant.scheme import Scheme

METHODS = ("rtn", "awq", "gptq", "awq+gptq", "auto")
GROUPS = (32, 64, 128, -1)
FAR_SECTIONS = ("methods", "calibration")  # which read the other texts too
FAR_WINDOWS = 4
CLOSE_WINDOWS = 8  # where rows differ by little
BITS = {4: 4, 3: 2, 8: 1}  # and the windows of each: what 8 bits lose is small and hardly varies
SEQ_LEN = 2048


class Run(NamedTuple):
    section: str
    name: str
    recipe: dict[str, Any]  # beside the calibration, which all have in common
    windows: int  # of the first text

    @property
    def key(self) -> str:
        return f"{self.section}: {self.name}, {Scheme(**self.recipe['scheme'])}"


# One step at a time, each on top of the one before it; then single choices that differ from the default.
PLAIN = {"correction": 0.0, "shrinkage": 0.0}
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("round to nearest", {"method": "rtn"}),
    ("GPTQ: static order, grids weighted by diag(H)", {"method": "gptq", "solver": PLAIN | {"order": "static"}}),
    ("+ shrinkage 0.3", {"method": "gptq", "solver": {"correction": 0.0, "order": "static"}}),
    ("+ order by groups, grids chosen in the loop (the preset fast)", {"preset": "fast"}),
    ("+ correction 0.75", {"method": "gptq"}),
    ("+ best of AWQ, GPTQ and both (the default)", {}),
    ("+ refit and descent, 2 passes", {"solver": {"refine": 2}}),
    ("default + 1 pass of them + trained rounding (the preset best)", {"preset": "best"}),
    ("default, correction 1.0", {"solver": {"correction": 1.0}}),
    ("default, damping 0.1", {"solver": {"damping": 0.1}}),
    (
        "GPTQ: static order, grids weighted by 1/U_jj^2",
        {"method": "gptq", "solver": PLAIN | {"order": "static", "weight": "pivot"}},
    ),
    ("AWQ, scales by the Gram form", {"method": "awq"}),
    ("AWQ, scales by the block's output", {"method": "awq", "solver": {"awq_loss": "block"}}),
]


def planned(calibration: str, headline: int) -> Iterator[Run]:
    for name, recipe in (("rtn", {"method": "rtn"}), ("default", {}), ("best", {"preset": "best"})):
        for symmetric in (True, False):
            scheme = {"group_size": 64, "symmetric": symmetric}
            yield Run("headline", name, recipe | {"scheme": scheme}, headline)
    for name, step in STEPS:
        yield Run("ablation", name, step | {"scheme": {"group_size": 64}}, CLOSE_WINDOWS)
    for bits, count in BITS.items():
        for group_size in GROUPS:
            for symmetric in (True, False):
                scheme = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
                for method in METHODS:
                    yield Run("methods", method, {"method": method, "scheme": scheme}, count)
    for source in ("self", "builtin", calibration):
        recipe = {"calibration": {"source": source}, "scheme": {"group_size": 64}}
        yield Run("calibration", Path(source).name, recipe, CLOSE_WINDOWS)


class Reference:
    """The original model on one text: its log-probabilities are computed once and kept."""

    def __init__(self, model: PreTrainedModel, ids: Tensor) -> None:
        self.ids = ids
        self.logp = [_logits(model, window).log_softmax(-1) for window in ids]

    def measure(self, model: PreTrainedModel, count: int) -> dict[str, float]:
        """Perplexity, mean KL(original || model) in nats and top-1 agreement over the first `count` windows; and the
        original's perplexity there."""
        nll, kl, same, before = [], [], [], []
        for window, reference in zip(self.ids[:count], self.logp, strict=False):
            parts = (tokens.split(32) for tokens in (_logits(model, window), reference, window[1:, None]))
            for logits, logp, next_token in zip(*parts, strict=True):  # a few at a time: they stay in cache
                logq = logits.log_softmax(-1)
                nll.append(-logq.gather(1, next_token))
                before.append(-logp.gather(1, next_token))
                kl.append((logp.exp() * (logp - logq)).sum(-1))
                same.append((logq.argmax(-1) == logp.argmax(-1)).float())
        return {
            "perplexity": math.exp(torch.cat(nll).double().mean()),
            "original": math.exp(torch.cat(before).double().mean()),
            "kl": float(torch.cat(kl).double().mean()),
            "top1": float(torch.cat(same).mean()),
        }


@torch.inference_mode()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()


def perform(run: Run, args: argparse.Namespace, references: dict[str, Reference]) -> dict[str, Any]:
    values = run.recipe | {
        "calibration": {"source": str(args.calibration), "samples": args.samples, "seq_len": args.seq_len}
        | run.recipe.get("calibration", {})
    }
    recipe = Recipe.from_dict(values)
    with tempfile.TemporaryDirectory() as out:
        started = time.perf_counter()
        plan = quantize(args.model, out, recipe, Options(overwrite=True))
        seconds = time.perf_counter() - started
        model = load(out, torch.float32)
    first, *far = references
    found = {first: references[first].measure(model, run.windows)}
    if run.section in FAR_SECTIONS and recipe.scheme.bits == 4 and recipe.scheme.group_size == 64:
        found |= {name: references[name].measure(model, FAR_WINDOWS) for name in far}
    return {
        "section": run.section,
        "name": run.name,
        "recipe": recipe.model_dump(mode="json", exclude={"calibration": {"source"}}),
        "windows": run.windows,
        "bits_per_weight": plan.bits_per_weight(),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "texts": found,
    }


def scheme_of(result: dict[str, Any]) -> str:
    return str(Scheme(**result["recipe"]["scheme"]))


def tables(results: dict[str, dict[str, Any]], text: str) -> str:
    """Every result of each section as a row."""
    lines = []
    for section in dict.fromkeys(result["section"] for result in results.values()):
        columns = ("", "scheme", "bits", "windows", "original", "perplexity", "KL", "same first choice", "seconds")
        lines += [f"\n## {section}\n", _row(*columns), "|---" * len(columns) + "|"]
        for result in results.values():
            if result["section"] == section:
                found = result["texts"][text]
                figures = (f"{found['original']:.2f}", f"{found['perplexity']:.2f}", f"{found['kl']:.4f}")
                size, count, seconds = f"{result['bits_per_weight']:.2f}", result["windows"], f"{result['seconds']:.0f}"
                scheme = scheme_of(result)
                lines.append(_row(result["name"], scheme, size, count, *figures, f"{found['top1']:.1%}", seconds))
    far = [r for r in results.values() if len(r["texts"]) > 1]
    if far:
        names = list(far[0]["texts"])
        lines += ["\n## KL on other texts\n", _row("", "scheme", *names), "|---" * (len(names) + 2) + "|"]
        for result in far:
            values = (f"{result['texts'][name]['kl']:.4f}" for name in names)
            lines.append(_row(result["name"], scheme_of(result), *values))
    return "\n".join(lines).strip() + "\n"


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def plot(results: dict[str, dict[str, Any]], text: str, path: Path) -> None:
    """KL against bits per weight, a line for each method; asymmetric 32-groups left out, see docs/accuracy.md."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "llmquant"  # the same results give the same file
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, symmetric in zip(axes, (True, False), strict=True):
        for method in METHODS:
            points = sorted(
                (result["bits_per_weight"], result["texts"][text]["kl"])
                for result in results.values()
                if result["section"] == "methods"
                and result["name"] == method
                and result["recipe"]["scheme"]["symmetric"] == symmetric
                and (symmetric or result["recipe"]["scheme"]["group_size"] != 32)
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
    parser.add_argument("--only", default="headline,ablation,methods,calibration")
    parser.add_argument("--out", type=Path, default=Path("docs/results/accuracy.json"))
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = json.loads(args.out.read_text())["results"] if args.out.exists() else {}
    runs = list(planned(str(args.calibration), args.headline))
    todo = [run for run in runs if run.section in args.only.split(",") and run.key not in results]
    tokenizer, original = load_tokenizer(args.model), load(args.model, torch.float32)
    most = max((run.windows for run in todo), default=1)
    references = {
        path.name: Reference(
            original, windows(tokenizer, read_text(path, None).content, SEQ_LEN, FAR_WINDOWS if i else most)
        )
        for i, path in enumerate(args.texts)
    }
    first = args.texts[0].name
    for number, run in enumerate(todo, 1):
        try:
            result = perform(run, args, references)
        except LlmquantError as error:
            print(f"{run.name}: {error}", flush=True)
            continue
        results[run.key] = result
        results = {run.key: results[run.key] for run in runs if run.key in results}
        print(f"{number}/{len(todo)} {run.key}: {result['texts'][first]}, {result['seconds']} s", flush=True)
        args.out.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(f"# Results of scripts/bench_accuracy.py\n\n{tables(results, first)}")
    if any(result["section"] == "methods" for result in results.values()):
        plot(results, first, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
