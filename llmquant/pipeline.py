"""The story on one screen: open, plan; for each layer fill, capture, solve, pack, write, advance; finish, verify."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from llmquant.calibration.batches import Calibration
from llmquant.calibration.prepare import prepare
from llmquant.calibration.stream import Stream
from llmquant.checkpoint.journal import Journal
from llmquant.checkpoint.reader import Checkpoint
from llmquant.finish import already_finished, check_output, clear, finish
from llmquant.kernels.attention import use_attention
from llmquant.manifest import MIXTURE, RECIPE
from llmquant.memory import peak, return_large_blocks
from llmquant.model.shell import Shell
from llmquant.observer import Observer, Silent
from llmquant.plan import Plan, check_original, make_plan
from llmquant.recipe import Recipe
from llmquant.sensitivity.measure import Sensitivity, measure
from llmquant.sensitivity.mixed import Mixture, mix, refuse_unreachable, settle
from llmquant.unit import Workplace, process, replay


@dataclass(frozen=True)
class Options:
    """How to run; it does not change what is asked for."""

    device: str = "cpu"
    max_memory: int | None = None  # bytes
    resume: bool = True
    overwrite: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the calibration activations; what is solved is fp32 everywhere."""
        slow = self.device == "cpu" and not torch.cpu._is_avx512_bf16_supported()
        return torch.float32 if slow else torch.bfloat16


DEFAULT, HERE, SILENT = Recipe(), Options(), Silent()


def open_plan(model: str | Path, recipe: Recipe, options: Options = HERE) -> tuple[Shell, Plan]:
    """Open the checkpoint and decide everything but what a target has to be measured for; nothing is written."""
    source = Checkpoint.open(model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    check_original(source)
    shell = Shell(source, options.device, options.compute_dtype)
    use_attention(shell.model)
    plan = make_plan(recipe, shell, options.max_memory)
    if recipe.target:
        refuse_unreachable(plan, shell, recipe.target)
    return shell, plan


def preview(model: str | Path, recipe: Recipe, options: Options = HERE, observer: Observer = SILENT) -> Plan:
    """What `quantize` would do; its target, if there is one, is measured for. Nothing is written."""
    shell, plan = open_plan(model, recipe, options)
    return settle(plan, shell, prepare(recipe, shell), noticed=observer.sensed) if recipe.target else plan


def sense(
    model: str | Path,
    recipe: Recipe,
    options: Options = HERE,
    observer: Observer = SILENT,
    *,
    isolated: bool = False,
) -> tuple[Sensitivity, Mixture | None]:
    """What each scheme would cost each linear, and the mixed precision for the recipe's target, if it has one."""
    shell, plan = open_plan(model, recipe, options)
    batches = prepare(recipe, shell).batches
    found = measure(recipe, shell, batches, isolated=isolated, noticed=observer.sensed)
    return found, mix(found, plan, shell, recipe.target) if recipe.target else None


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: Recipe = DEFAULT,
    options: Options = HERE,
    observer: Observer = SILENT,
) -> Plan:
    """Quantize the checkpoint `model` (a directory or a Hub name) into the directory `out`.

    A run that was stopped continues where it was, and its result is the same, byte for byte.

    Raises:
        LlmquantError: one line that says what is wrong. Nothing in `out` then looks complete.
    """
    since = perf_counter()
    return_large_blocks()
    out = Path(out)
    shell, plan = open_plan(model, recipe, options)
    check_output(out, shell.source.root)
    calibration = prepare(recipe, shell) if recipe.calibrated or recipe.target else None
    fingerprint = plan.fingerprint(shell, calibration)
    if already_finished(out, fingerprint, overwrite=options.overwrite):
        return make_plan(Recipe.from_yaml(out / RECIPE), shell) if recipe.target else plan
    with Journal.open(out, fingerprint, resume=options.resume) as journal:
        if not journal.records:
            clear(out)
        if calibration:
            plan = settle(plan, shell, calibration, out / MIXTURE, observer.sensed)
        observer.planned(plan, calibration, done=len(journal.records))
        place = Workplace(plan, shell, open_stream(plan, shell, calibration, out), out)
        for number, unit in enumerate(plan.units):
            if number < len(journal.records):
                replay(unit, place, journal.records[number])
            else:
                record, before = process(unit, place, observer), since
                since = perf_counter()
                journal.commit(record | {"seconds": since - before, "peak_memory": peak()})
            observer.finished(unit)
        finish(out, plan, calibration, fingerprint, shell.source, journal, since)
    return plan


def open_stream(plan: Plan, shell: Shell, calibration: Calibration | None, out: Path) -> Stream | None:
    """The calibration text at the first layer; twice, where the original model's activations are aimed at."""
    if calibration is None or not plan.recipe.calibrated:
        return None
    solver = plan.recipe.solver
    compared = bool(solver.correction or solver.train)
    spill = out if plan.estimate.spilled else None
    return Stream(shell, plan.layers, calibration.batches, compared=compared, spill=spill)
