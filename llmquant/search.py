"""`llmquant quantize --max-increase`: the cheapest recipe of a ladder with which the perplexity stays within a bound.

Each attempt is a whole checkpoint, measured on a text. While the bound does not hold, the next step is laid over the
recipe that did best so far. OUT.attempts holds the best checkpoint, the one in progress, and a record of all: a search
that was stopped goes on from there, and one with another bound or budget starts with what was measured already.
"""

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from llmquant.calibration.prepare import prepare
from llmquant.checkpoint import durable
from llmquant.checkpoint.parts import file_sha256
from llmquant.checkpoint.strict_json import parse_object
from llmquant.checkpoint.writer import json_bytes, write_json
from llmquant.errors import GateError, OutputError, RecipeError
from llmquant.evaluate.bootstrap import intervals
from llmquant.evaluate.fit import open_models
from llmquant.evaluate.perplexity import Perplexity, perplexity
from llmquant.evaluate.protocol import Request
from llmquant.evaluate.run import cut_for
from llmquant.evaluate.text import Source
from llmquant.manifest import ATTEMPTS, MANIFEST, RECIPE
from llmquant.model.experts import has_experts
from llmquant.observer import Observer
from llmquant.pipeline import Options, open_plan, quantize
from llmquant.plan import Plan, stored_bits
from llmquant.recipe import Recipe, SolverRecipe
from llmquant.recipe import Target as MixedTarget
from llmquant.sensitivity.measure import measure
from llmquant.sensitivity.mixed import mix
from llmquant.version import __version__

MORE_BITS = (0.25, 0.5, 1.0, 2.0, 4.0)  # per weight, that mixed precision adds to the best uniform recipe


class Target(NamedTuple):
    """What is to be reached, on which text, and what it may cost."""

    max_increase: float  # of perplexity over the original's, a fraction
    source: Source
    max_windows: int | None = None
    max_bits: float | None = None  # per weight of the layers' linears
    max_bytes: int | None = None  # of all weight files


@dataclass(frozen=True)
class Attempt:
    """One checkpoint that was made, or was not because it would be too large."""

    name: str
    recipe: dict[str, Any]
    bits_per_weight: float  # of all linears of the layers, kept ones too
    bytes: int
    perplexity: float | None = None  # None: over the budget, not made
    increase: float | None = None
    interval: tuple[float, float] | None = None  # of the increase
    seconds: float = 0.0

    @property
    def digest(self) -> str:
        return digest_of(self.recipe)

    def __str__(self) -> str:
        size = f"{self.name}: {self.bits_per_weight:.2f} bits per weight, {self.bytes / 1e6:.1f} MB"
        if self.increase is None:
            return f"{size}, over the budget: not tried"
        around = f" ({self.interval[0]:+.2%} to {self.interval[1]:+.2%})" if self.interval else ""
        return f"{size}, perplexity {self.perplexity:.2f}, {self.increase:+.2%}{around}, {self.seconds:.0f} s"


def digest_of(recipe: dict[str, Any]) -> str:
    return hashlib.sha256(json_bytes(recipe)).hexdigest()[:12]


@dataclass(frozen=True)
class Outcome:
    """What `out` is now, and what was tried for it."""

    out: Path
    max_increase: float
    best: Attempt | None  # None: all were over the budget
    attempts: tuple[Attempt, ...]

    @property
    def held(self) -> bool:
        return self.best is not None and self.best.increase is not None and self.best.increase <= self.max_increase

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out), "held": self.held}

    def require(self) -> None:
        """Raise GateError unless the bound holds."""
        if not self.held:
            best = f"the best, in {self.out}: {self.best}" if self.best else "none is within the budget"
            tried = f"{len(self.attempts)} attempts"
            raise GateError(f"--max-increase {self.max_increase:.2%}: not reached in {tried}; {best}")


class Search:
    """One search and what it has on the disk.

    Attributes:
        attempts: in the order in which they were made; those of earlier searches for the same thing among them.
    """

    def __init__(
        self, model: str, out: Path, calibration: str, options: Options, target: Target, observer: Observer
    ) -> None:
        """Raises OutputError if `out` holds something else."""
        self._out, self._work = out, out.parent / f"{out.name}.attempts"
        self._model, self._target, self._observer = model, target, observer
        self._options, self._overwrite = replace(options, overwrite=False), options.overwrite
        self._shell, _ = open_plan(model, Recipe(), self._options)
        text = target.source.read()
        limit = getattr(self._shell.config.get_text_config(), "max_position_embeddings", None)
        length = min(Request().length, limit or Request().length)
        request = Request(seq_len=length, max_windows=target.max_windows)
        self._text = cut_for(self._shell.source.root, text, request, torch.float32)
        self._baseline: Perplexity | None = None
        self._head = {
            "input": self._shell.source.fingerprint(),
            "protocol": str(self._text.protocol),
            "calibration": file_sha256(Path(calibration)) if Path(calibration).is_file() else calibration,
            "llmquant": __version__,
        }
        self.attempts: list[Attempt] = []
        self._take_up()

    @property
    def best(self) -> Attempt | None:
        """The one that lost least; of equals the first."""
        tried = [attempt for attempt in self.attempts if attempt.increase is not None and self._within(attempt)]
        return min(tried, key=lambda attempt: attempt.increase or 0.0, default=None)

    @property
    def held(self) -> Attempt | None:
        """The first that keeps the bound."""
        best = self.best
        return best if best is not None and (best.increase or 0.0) <= self._target.max_increase else None

    @property
    def experts(self) -> bool:
        """Whether the model is a mixture of experts, whose losses are not measured one by one."""
        return has_experts(self._shell.model)

    def mixtures(self, recipe: Recipe) -> Iterator[tuple[float, Recipe]]:
        """Bits per weight, and the recipe that is predicted to lose least with them; the model is measured once."""
        shell, plan = open_plan(self._model, recipe, self._options)
        batches = prepare(recipe, shell).batches
        sensitivity = measure(recipe, shell, batches, noticed=self._observer.sensed)
        choices = tuple(sorted({recipe.scheme.bits, 4, 8, 16}))
        for more in MORE_BITS:
            bits = self._bits(plan) + more
            yield bits, mix(sensitivity, plan, shell, MixedTarget(bits=bits, choices=choices)).recipe

    def attempt(self, name: str, recipe: Recipe) -> Attempt:
        """Make and measure a checkpoint, unless that was done already."""
        _, plan = open_plan(self._model, recipe, self._options)
        made = Attempt(name, recipe.model_dump(mode="json"), self._bits(plan), plan.bytes_out)
        known = next((a for a in self.attempts if a.digest == made.digest and a.increase is not None), None)
        if known is not None:
            return known
        if self._within(made):
            started = perf_counter()
            self._clear(keep=made)
            directory = self._work / made.digest
            quantize(self._model, directory, recipe, self._options, self._observer)
            made = replace(self._measured(made), seconds=perf_counter() - started)
        self.attempts.append(made)
        self._record()
        return made

    def _record(self) -> None:
        write_json(self._work / ATTEMPTS, {"head": self._head, "attempts": [asdict(a) for a in self.attempts]})

    def finish(self) -> None:
        """Put the best checkpoint, and the record, in the place of OUT.

        It is made again if an earlier search, with another budget, removed it for a better one.
        """
        best = self.best
        self._clear()
        if best is not None:
            directory = self._work / best.digest
            quantize(self._model, directory, Recipe.from_dict(best.recipe), self._options, self._observer)
            with durable.reported(self._out):
                shutil.copyfile(self._work / ATTEMPTS, directory / ATTEMPTS)
                if self._out.exists():
                    shutil.rmtree(self._out)
                durable.replace(directory, self._out)
        with durable.reported(self._work):
            shutil.rmtree(self._work)

    def _bits(self, plan: Plan) -> float:
        stored = weights = 0
        for linear in plan.linears:
            m, n, size = linear.m, linear.n, self._shell.stored_dtype(f"{linear.name}.weight").itemsize
            stored += stored_bits(m, n, linear.scheme, plan.recipe.format) if linear.scheme else 8 * size * m * n
            weights += m * n
        return stored / weights

    def _within(self, attempt: Attempt) -> bool:
        bits, size = self._target.max_bits, self._target.max_bytes
        return not (bits and attempt.bits_per_weight > bits) and not (size and attempt.bytes > size)

    def _measured(self, made: Attempt) -> Attempt:
        if self._baseline is None:
            self._baseline = self._read(self._shell.source.root)
        found = self._read(self._work / made.digest)
        figures = torch.stack([found.nll, self._baseline.nll])
        ends = intervals(figures, {"increase": lambda mean: (mean[0] - mean[1]).exp() - 1})
        increase = found.value / self._baseline.value - 1
        return replace(made, perplexity=found.value, increase=increase, interval=ends.get("increase"))

    def _read(self, directory: Path) -> Perplexity:
        device = self._options.device
        most = self._options.max_memory if device == "cpu" else None  # it is asked of this process, not of a GPU
        (model,) = open_models([directory], self._text, torch.float32, most, device=device)
        return perplexity(model, self._text)

    def _clear(self, keep: Attempt | None = None) -> None:
        """Remove all checkpoints but the best one and `keep`."""
        kept = {attempt.digest for attempt in (self.best, keep) if attempt}
        with durable.reported(self._work):
            for path in self._work.iterdir():
                if path.is_dir() and path.name not in kept:
                    shutil.rmtree(path)

    def _take_up(self) -> None:
        """What an earlier search for the same thing left, in OUT.attempts or, if it came to an end, in OUT."""
        finished, ended = (self._out / MANIFEST).is_file(), self._recorded(self._out)
        if self._out.exists() and not finished and any(self._out.iterdir()):
            raise OutputError(f"{self._out}: holds something that is no checkpoint of llmquant; choose another -o")
        if finished and not ended and not self._overwrite:
            raise OutputError(f"{self._out}: holds a finished checkpoint; use --overwrite to replace it")
        with durable.reported(self._work):
            if not self._options.resume and self._work.exists():
                shutil.rmtree(self._work)
            durable.make_directory(self._work)
            self.attempts = max(self._recorded(self._work), ended, key=len)
            if ended:
                place = self._work / digest_of(Recipe.from_yaml(self._out / RECIPE).model_dump(mode="json"))
                if place.exists():
                    shutil.rmtree(place)
                durable.replace(self._out, place)
        self._record()

    def _recorded(self, directory: Path) -> list[Attempt]:
        path = directory / ATTEMPTS
        record = parse_object(path.read_bytes(), path) if path.is_file() else {}
        return [Attempt(**attempt) for attempt in record["attempts"]] if record.get("head") == self._head else []


def search(
    model: str,
    out: Path,
    recipe: Recipe,
    options: Options,
    target: Target,
    observer: Observer,
    told: Callable[[Attempt], None],
) -> Outcome:
    """Climb the ladder until the bound holds, or ladder or budget end; `out` is then the best checkpoint, if any.

    Raises:
        RecipeError: the recipe has a target of its own, or there is no text.
    """
    if recipe.target is not None:
        raise RecipeError("--max-increase: chooses mixed precision by itself; leave --target-... out")
    found = Search(model, out, recipe.calibration.source, options, target, observer)
    for attempt in climb(found, recipe):
        told(attempt)
        if found.held:
            break
    found.finish()
    return Outcome(out, target.max_increase, found.best, tuple(found.attempts))


def climb(found: Search, recipe: Recipe) -> Iterator[Attempt]:
    """Attempts at a rising price, each a step on top of what did best before; one that changes nothing is left out."""
    base = found.attempt("as asked", recipe)
    yield base
    for name, step in STEPS.items():
        before = Recipe.from_dict(base.recipe)
        if (wanted := step(before)) != before:
            made = found.attempt(name, wanted)
            base = min(base, made, key=lambda attempt: math.inf if attempt.increase is None else attempt.increase)
            yield made
    best = Recipe.from_dict(base.recipe)
    if found.experts:
        yield found.attempt("8 bits", best.model_copy(update={"scheme": replace(best.scheme, bits=8)}))
        return
    for bits, wanted in found.mixtures(best):
        yield found.attempt(f"mixed precision of {bits:.2f} bits", wanted)


def more_calibration(recipe: Recipe) -> Recipe:
    wanted = recipe.calibration.model_copy(update={"samples": 2 * recipe.calibration.samples})
    return recipe.model_copy(update={"calibration": wanted}) if recipe.calibrated else recipe


def groups_of(size: int) -> Callable[[Recipe], Recipe]:
    def step(recipe: Recipe) -> Recipe:
        if 0 < recipe.scheme.group_size <= size:
            return recipe
        return recipe.model_copy(update={"scheme": replace(recipe.scheme, group_size=size)})

    return step


def all_methods(recipe: Recipe) -> Recipe:
    """The best of all methods, corrected towards the original model.

    Trained rounding is no step, as it takes four times the time; the preset `best` gives it to every attempt.
    """
    correction = max(recipe.solver.correction, SolverRecipe().correction)
    solver = recipe.solver.model_copy(update={"correction": correction})
    return recipe.model_copy(update={"method": "auto", "solver": solver})


STEPS: dict[str, Callable[[Recipe], Recipe]] = {
    "twice the calibration text": more_calibration,
    "groups of 64": groups_of(64),
    "groups of 32": groups_of(32),
    "the best of all methods": all_methods,
}
