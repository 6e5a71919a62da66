"""The story on one screen: open, plan; for each layer fill, capture, solve, pack, write, advance; finish, verify."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmquant.calibration.batches import Calibration
from llmquant.calibration.prepare import prepare
from llmquant.calibration.stream import Stream
from llmquant.checkpoint.journal import Journal
from llmquant.checkpoint.parts import file_sha256, read_tensors
from llmquant.checkpoint.reader import Checkpoint
from llmquant.checkpoint.writer import write_shard
from llmquant.errors import OutputError
from llmquant.finish import already_finished, check_output, clear, finish
from llmquant.formats import FORMATS
from llmquant.memory import return_large_blocks
from llmquant.model.shell import Shell
from llmquant.plan import Plan, Stack, Unit, check_original, make_plan
from llmquant.recipe import Recipe
from llmquant.scheme import Quantized, dequantize
from llmquant.solve.hessian import Hessian
from llmquant.solve.methods import METHODS, output_error


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
        return torch.float32 if self.device == "cpu" else torch.bfloat16


class Observer(Protocol):
    """Is told what happens, as it happens, and changes nothing."""

    def planned(self, plan: Plan, calibration: Calibration | None, done: int) -> None: ...
    def solved(self, record: dict[str, Any]) -> None: ...
    def finished(self, unit: Unit) -> None: ...


class Silent:
    """The observer that says nothing."""

    def planned(self, plan: Plan, calibration: Calibration | None, done: int) -> None: ...
    def solved(self, record: dict[str, Any]) -> None: ...
    def finished(self, unit: Unit) -> None: ...


DEFAULT, HERE, SILENT = Recipe(), Options(), Silent()


def open_plan(model: str | Path, recipe: Recipe, options: Options = HERE) -> tuple[Shell, Plan]:
    """Open the checkpoint and decide everything; nothing is written."""
    source = Checkpoint.open(model, revision=options.revision, trust_remote_code=options.trust_remote_code)
    check_original(source)
    shell = Shell(source, options.device, options.compute_dtype)
    return shell, make_plan(recipe, shell, options.max_memory)


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
    return_large_blocks()
    out = Path(out)
    shell, plan = open_plan(model, recipe, options)
    check_output(out, shell.source.root)
    calibration = prepare(recipe, shell) if METHODS[recipe.method].calibrated else None
    fingerprint = plan.fingerprint(shell, calibration)
    if already_finished(out, fingerprint, overwrite=options.overwrite):
        return plan
    with Journal.open(out, fingerprint, resume=options.resume) as journal:
        if not journal.records:
            clear(out)
        observer.planned(plan, calibration, done=len(journal.records))
        stream = Stream(shell, plan.layers, calibration.batches) if calibration else None
        for number, unit in enumerate(plan.units):
            if number < len(journal.records):
                replay(unit, shell, stream, plan, out, journal.records[number])
            else:
                journal.commit(process(unit, shell, stream, plan, out, observer))
            observer.finished(unit)
        finish(out, plan, shell, calibration, journal)
    return plan


def process(
    unit: Unit, shell: Shell, stream: Stream | None, plan: Plan, out: Path, observer: Observer
) -> dict[str, Any]:
    """Fill, capture, solve, pack, write and advance one unit. Returns its journal record."""
    tensors: dict[str, Tensor] = {}
    modules = []
    with shell.filled(shell.part(unit.name)):
        for stack in unit.stacks:
            started = time.perf_counter()
            H, tokens = capture(stack, unit, shell, stream)
            solved = solve(stack, H, shell, plan)
            seconds = (time.perf_counter() - started) / len(solved)  # the stack is one problem: each member's share
            for name, q, record in solved:
                shell.set_weight(name, dequantize(q, stack.scheme))
                dtype = shell.stored_dtype(f"{name}.weight")
                tensors |= FORMATS[plan.recipe.format].pack(shell.stored_prefix(name), q, stack.scheme, dtype)
                record |= {"tokens": tokens, "seconds": round(seconds, 3)}
                modules.append(record)
                observer.solved(record)
        tensors |= {shell.stored_name(name): shell.read(name) for name in unit.kept}
        shards = {s.file: write_shard(out / s.file, {name: tensors[name] for name in s.tensors}) for s in unit.shards}
        digest = advance(unit, stream)
    return {"unit": unit.name, "shards": shards, "stream": digest, "modules": modules}


def capture(stack: Stack, unit: Unit, shell: Shell, stream: Stream | None) -> tuple[Tensor | None, int]:
    """H = X^T X / k of the stack's input, with everything before it already quantized; and the tokens k seen."""
    if stream is None or unit.layer is None:
        return None, 0
    hessian = Hessian(stack.n, shell.device)
    first = stack.linears[0].name
    stream.capture(unit.layer, first, hessian.update)
    return hessian.mean(first), hessian.tokens


def solve(stack: Stack, H: Tensor | None, shell: Shell, plan: Plan) -> list[tuple[str, Quantized, dict[str, Any]]]:
    """Solve linears that share an input as one matrix, and take the result apart again."""
    weights = {linear.name: shell.weight(linear.name).float() for linear in stack.linears}
    solution = METHODS[plan.recipe.method].solve(torch.cat(list(weights.values())), H, stack.scheme)
    rows = [linear.m for linear in stack.linears]
    parts = [Quantized(*part) for part in zip(*(field.split(rows) for field in solution.quantized), strict=True)]
    results = []
    for (name, W), q in zip(weights.items(), parts, strict=True):
        error = output_error(W, q, stack.scheme, H)
        record = {"module": name, "method": plan.recipe.method, "scheme": str(stack.scheme), "error": error}
        results.append((name, q, record | {"damping": solution.damping, "rung": solution.rung}))
    return results


def advance(unit: Unit, stream: Stream | None) -> str:
    """Move the stream through a filled layer; the digest of where it is now."""
    if stream is None:
        return ""
    if unit.layer is not None:
        stream.advance(unit.layer)
    return stream.digest()


def replay(unit: Unit, shell: Shell, stream: Stream | None, plan: Plan, out: Path, record: dict[str, Any]) -> None:
    """Bring the stream past a finished unit with the weights that its shard holds.

    Raises:
        OutputError: the shard is not the one that was committed, or leads to other activations.
    """
    tensors: dict[str, Tensor] = {}
    for shard in unit.shards:
        path = out / shard.file
        if not path.is_file() or file_sha256(path) != record["shards"].get(shard.file):
            raise OutputError(f"{path}: is not what this run wrote; start anew with --no-resume")
        tensors |= read_tensors(path)
    with shell.filled(shell.part(unit.name)):
        for stack in unit.stacks:
            for linear in stack.linears:
                prefix, read = shell.stored_prefix(linear.name), tensors.__getitem__
                q = FORMATS[plan.recipe.format].unpack(prefix, read, linear.m, linear.n, stack.scheme)
                shell.set_weight(linear.name, dequantize(q, stack.scheme))
        if advance(unit, stream) != record["stream"]:
            raise OutputError(f"{out}: replaying {unit.name} gave other activations than before; use --no-resume")
