"""One unit of work: a decoder layer, or what is outside of them, from the checkpoint to its shards."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from llmquant.calibration.crossing import Crossing
from llmquant.calibration.stream import Stream, aside
from llmquant.checkpoint.parts import file_sha256, read_tensors
from llmquant.checkpoint.writer import write_shard
from llmquant.errors import OutputError, RecipeError
from llmquant.formats import FORMATS
from llmquant.model.experts import GUEST_WEIGHT
from llmquant.model.fold import LinearFold, NormFold
from llmquant.model.shell import Shell, joined
from llmquant.observer import Observer
from llmquant.plan import Plan, Stack, Unit
from llmquant.scheme import Quantized, Scheme, dequantize
from llmquant.solve.awq import SAMPLED_ROWS, Loss, sampled
from llmquant.solve.methods import Choices, Problem, Solution, compare, solve
from llmquant.solve.moments import Moments, relative_error
from llmquant.solve.train import token_loss, train_rounding

HELD_OUT = 8  # one sequence of so many is held out, where something is to be judged
FEWEST_HELD = 32  # tokens held out for an expert: by fewer nothing is judged
TRIAL_BATCHES = 4  # on which AWQ's block loss is computed


@dataclass(frozen=True)
class Workplace:
    """What all units have in common."""

    plan: Plan
    shell: Shell
    stream: Stream | None
    out: Path

    @property
    def held_out(self) -> set[int]:
        """The batches that something is judged by before a solver may see them: every eighth, or the last of fewer."""
        if self.stream is None or not (self.plan.recipe.method == "auto" or self.plan.recipe.solver.train):
            return set()
        count = len(self.stream.masks)
        return set(range(HELD_OUT - 1, count, HELD_OUT)) or set(range(1, count)[-1:])

    def cross(self, unit: Unit) -> AbstractContextManager[Crossing | None]:
        """The way of the stream through a filled layer, with a stop at each linear to solve.

        Where a layer's last linears write to the residual stream, aiming at the original model's inputs fits the
        calibration text and not the model: there nothing is compared. Nor is it in a mixture of experts, where the
        original model may send a token elsewhere.
        """
        if self.stream is None or unit.layer is None:
            return nullcontext()
        stops = tuple(stack.linears[0].name for stack in unit.stacks)
        last, mixture = unit.layer.groups[-1].linears[0], unit.layer.mixture
        inside = () if mixture is None else (f"{mixture}.",)
        compared = tuple(stop for stop in stops if stop != last and not stop.startswith(inside))
        return Crossing(self.stream, unit.layer, stops, compared)


def process(unit: Unit, place: Workplace, observer: Observer) -> dict[str, Any]:
    """Fill, capture, solve, pack, write and advance one unit. Returns its journal record."""
    with place.shell.filled(place.shell.part(unit.name)), place.cross(unit) as crossing:
        work = _Work(unit, place, crossing)
        for stack in unit.stacks:
            for record in work.solve(stack):
                observer.solved(record)
        training = work.train()
        tensors = work.tensors()
        shards = {s.file: write_shard(place.out / s.file, {n: tensors[n] for n in s.tensors}) for s in unit.shards}
        if crossing:
            crossing.advance()
    digest = place.stream.digest() if place.stream else ""
    return {"unit": unit.name, "shards": shards, "stream": digest, "modules": work.records} | training


def replay(unit: Unit, place: Workplace, record: dict[str, Any]) -> None:
    """Bring the stream past a finished unit with the tensors that its shards hold.

    Raises:
        OutputError: a shard is not the one that was committed, or leads to other activations.
    """
    shell, tensors = place.shell, dict[str, Tensor]()
    for shard in unit.shards:
        path = place.out / shard.file
        if not path.is_file() or file_sha256(path) != record["shards"].get(shard.file):
            raise OutputError(f"{path}: is not what this run wrote; start anew with --no-resume")
        tensors |= read_tensors(path)
    if place.stream is None or unit.layer is None:
        return
    with shell.filled(shell.part(unit.name)), Crossing(place.stream, unit.layer) as crossing:
        for stack in unit.stacks:
            for linear in stack.linears:
                prefix = shell.stored_prefix(linear.name)
                q = FORMATS[place.plan.recipe.format].unpack(prefix, tensors, linear.m, linear.n, stack.scheme)
                shell.set_weight(linear.name, dequantize(q, stack.scheme))
        for name in unit.kept:  # a scale may have been folded into one
            shell.set_tensor(name, joined([tensors[part] for part in shell.stored_names(name)]))
        crossing.advance()
    if place.stream.digest() != record["stream"]:
        raise OutputError(f"{place.out}: {unit.name} leads to other activations than before; start anew (--no-resume)")


class _Work:
    """A layer that is being solved."""

    def __init__(self, unit: Unit, place: Workplace, crossing: Crossing | None) -> None:
        self.unit, self.place, self.crossing = unit, place, crossing
        self.shell, self.recipe = place.shell, place.plan.recipe
        solver = self.recipe.solver
        self.choices = Choices(
            solver.order, solver.weight, solver.damping, solver.shrinkage, solver.correction, solver.refine
        )
        self.quantized: dict[str, tuple[Quantized, Scheme]] = {}
        self.packed: dict[str, Tensor] = {}  # what has its last form already, by stored name
        self.aims: dict[str, Tensor] = {}  # what the integers stand for, where they are to be trained
        self.changed: dict[str, Tensor] = {}  # kept tensors with a scale folded into them
        self.records: list[dict[str, Any]] = []

    def solve(self, stack: Stack) -> Iterator[dict[str, Any]]:
        """Solve one stack and put its weights in place. Yields a record for each linear."""
        started = perf_counter()
        W = {linear.name: self.shell.read(f"{linear.name}.weight").to(self.shell.device) for linear in stack.linears}
        stacked = torch.cat(list(W.values())).float()
        moments = self.capture(stack)
        fold = self.fold(stack)
        method, errors = self.choose(stack, stacked, moments, fold)
        problem = self.problem(stack, stacked, moments, fold)
        solution = solve(problem, method)
        rows = [linear.m for linear in stack.linears]
        parts = [Quantized(*part) for part in zip(*(f.split(rows) for f in solution.quantized), strict=True)]
        for name, q in zip(W, parts, strict=True):
            self.put(name, q, stack.scheme)
        if self.recipe.solver.train:
            aim = problem.target if solution.fold is None else problem.target * solution.fold
            self.aims |= {name: part.clone() for name, part in zip(W, aim.split(rows), strict=True)}
        if fold is not None and solution.fold is not None:
            self.apply(fold, solution.fold)
        if stack.expert and not self.recipe.solver.train:  # nothing is folded into it, and its like are many
            self.pack(W)
        seconds = (perf_counter() - started) / len(W)  # the stack is one problem: each member's share
        for name, Q in zip(W, solution.weight(stack.scheme).split(rows), strict=True):
            record = _record(name, stack.scheme, solution, W[name].float(), Q, problem.H)
            record |= ({"held_out": errors} if errors else {}) | ({"expert": True} if stack.expert else {})
            self.records.append(record | {"tokens": moments.tokens if moments else 0, "seconds": round(seconds, 3)})
            yield self.records[-1]

    def choose(
        self, stack: Stack, W: Tensor, moments: Moments | None, fold: NormFold | LinearFold | None
    ) -> tuple[str, dict[str, float]]:
        """The method, and the errors of all that were compared for it."""
        method = str(self.recipe.method)
        if moments is None and stack.expert:  # that no token has reached
            return "rtn", {}
        if method != "auto":
            return method, {}
        if moments is None or not self.judges(stack):
            return "gptq", {}
        if stack.expert and moments.held < FEWEST_HELD:
            return "gptq", {}
        errors = self.compare(self.problem(stack, W, moments, fold), moments)
        return min(errors, key=errors.__getitem__), errors

    def judges(self, stack: Stack) -> bool:
        """Whether methods are compared: where a norm feeds the linears.

        The error of a linear that writes to the residual stream says less of what it does to the model than of a few
        tokens, whose states are far larger after the layer, or far smaller, than before it.
        """
        return self.crossing is not None and self.recipe.method == "auto" and stack.normed

    def capture(self, stack: Stack) -> Moments | None:
        """The moments of the stack's input, with everything before it already quantized.

        A linear that no norm feeds writes to the residual stream, where an error counts by the size of what it is added
        to: its tokens are divided by that size. Otherwise the first token, a thousand times larger, would be all.
        None without calibration text, and for an expert that none of it has reached.
        """
        if self.crossing is None:
            return None
        first = stack.linears[0].name
        moments = Moments(stack.n, self.shell.device, compared=self.crossing.compares(first))
        held_out = self.place.held_out if self.judges(stack) or self.recipe.solver.train else ()
        for i, (x, mask, size, original, guests) in enumerate(self.crossing.samples(first)):
            if not stack.normed:
                size = size.to(x).view(*x.shape[:-1], 1)
                x, original = x / size, None if original is None else original / size
            own = len(x) - guests
            (moments.hold_out if i in held_out else moments.update)(x[:own], mask[:own], original)
            if guests and i not in held_out:
                moments.lend(x[own:], mask[own:], GUEST_WEIGHT)
        if stack.expert and moments.held < FEWEST_HELD:
            self.judged(moments)
        return moments if moments.seen or not stack.expert else None

    def problem(self, stack: Stack, W: Tensor, moments: Moments | None, fold: NormFold | LinearFold | None) -> Problem:
        return Problem(
            W,
            stack.scheme,
            self.choices,
            moments.H(stack.linears[0].name) if moments else None,
            moments.D() if moments else None,
            fold.settle if fold else None,
            self.block_loss(stack, W) if self.recipe.solver.awq_loss == "block" else None,
        )

    def compare(self, trial: Problem, moments: Moments) -> dict[str, float]:
        """The error of each candidate on the tokens held out, which the solver then may see, too.

        Raises:
            RecipeError: there are none.
        """
        if (held_out := moments.held_out()) is None:
            raise RecipeError(
                "method: auto compares on calibration sequences held out, and there is one only; add samples"
            )
        errors = compare(trial, *held_out)
        self.judged(moments)
        return errors

    def judged(self, moments: Moments) -> None:
        """The solver may see what was held out, unless that has yet to judge the training."""
        if not self.recipe.solver.train:
            moments.take_in()

    def fold(self, stack: Stack) -> NormFold | LinearFold | None:
        """Where scales on the stack's columns can go."""
        if stack.norm and self.unit.layer and self.unit.layer.norm_offset is not None:
            return NormFold(self.shell, stack.norm, self.unit.layer.norm_offset)
        return LinearFold(self.shell, stack.source, self.quantized[stack.source][0]) if stack.source else None

    def apply(self, fold: NormFold | LinearFold, s: Tensor) -> None:
        if isinstance(fold, LinearFold):
            q, changed = fold.apply(s)
            self.put(fold.linear, q, self.quantized[fold.linear][1])
            if fold.linear in self.aims:
                self.aims[fold.linear][-len(s) :] /= s.unsqueeze(1)
        else:
            changed = fold.apply(s)
        self.changed |= changed
        if self.crossing:
            self.crossing.again()

    def put(self, linear: str, q: Quantized, scheme: Scheme) -> None:
        self.quantized[linear] = q, scheme
        self.shell.set_weight(linear, dequantize(q, scheme))

    def block_loss(self, stack: Stack, W: Tensor) -> Loss | None:
        """The error of the layer's output, on a few batches, with a weight in the place of the stack's."""
        if self.crossing is None:
            return None
        crossing, names = self.crossing, [linear.name for linear in stack.linears]
        batches = range(min(TRIAL_BATCHES, len(crossing.stream.masks)))

        def outputs(Q: Tensor) -> list[Tensor]:
            parts = Q.split([linear.m for linear in stack.linears])
            weights = {name: part.to(self.shell.dtype) for name, part in zip(names, parts, strict=True)}
            with torch.no_grad():
                return [self.forward(weights, i) for i in batches]

        wanted = outputs(W)
        masks = crossing.stream.masks
        return lambda Q: sum(float(token_loss(o, w, m)) for o, w, m in zip(outputs(Q), wanted, masks, strict=False))

    def forward(self, weights: dict[str, Tensor], batch: int) -> Tensor:
        """One batch through the layer as it stands, but for these weights."""
        if self.crossing is None:
            raise ValueError("there are no activations to pass through the layer")
        stream, layer, prefix = self.crossing.stream, self.crossing.layer, f"{self.unit.name}."
        own = {f"{name.removeprefix(prefix)}.weight": weight for name, weight in weights.items()}
        module = stream.module(layer)
        call = lambda *args, **kwargs: functional_call(module, own, args, kwargs)  # noqa: E731
        return stream.forward(layer, call, stream.hidden, aside(stream.left), batch)

    def train(self) -> dict[str, Any]:
        """Refine all integers of the layer together, if the recipe asks for it; what to record of it."""
        iterations = self.recipe.solver.train
        if not (iterations and self.crossing and self.quantized):
            return {}
        started = perf_counter()
        trained, before, after = train_rounding(
            self.forward,
            self.crossing.targets(),
            self.crossing.stream.masks,
            self.place.held_out,
            {name: (q, scheme, self.aims[name]) for name, (q, scheme) in self.quantized.items()},
            iterations=iterations,
            dtype=self.shell.dtype,
            seed=self.recipe.seed,
        )
        if after < before:
            for name, q in trained.items():
                self.put(name, q, self.quantized[name][1])
            self.crossing.again()
        return {"training": {"before": before, "after": after, "seconds": round(perf_counter() - started, 3)}}

    def pack(self, linears: Iterable[str]) -> None:
        """Bring linears to what is stored of them; they are not to change any more."""
        for name in linears:
            q, scheme = self.quantized.pop(name)
            dtype = self.shell.stored_dtype(f"{name}.weight")
            self.packed |= FORMATS[self.recipe.format].pack(self.shell.stored_prefix(name), q, scheme, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All that the unit's shards hold, by stored name."""
        self.pack(list(self.quantized))
        tensors = self.packed
        for name in self.unit.kept:
            (only, *_) = self.shell.stored_names(name)  # nothing folds into one in parts
            tensors |= {only: self.changed[name]} if name in self.changed else self.shell.stored(name)
        return tensors


def _record(name: str, scheme: Scheme, solution: Solution, W: Tensor, Q: Tensor, H: Tensor | None) -> dict[str, Any]:
    """What the run log says of a linear. Without activations the error is that of the weight itself."""
    weight_error = lambda: float((W - Q).square().sum() / W.square().sum().clamp(min=1e-30))  # noqa: E731
    error = weight_error() if H is None else relative_error(sampled(W, SAMPLED_ROWS), sampled(Q, SAMPLED_ROWS), H)
    record = {"module": name, "method": solution.method, "scheme": str(scheme), "error": error}
    if H is not None:
        sizes = H.diagonal().clamp(min=0).sqrt()
        record["outliers"] = float(sizes.max() / sizes.median().clamp(min=1e-20))  # of the channels of its input
    return record | {"damping": solution.damping, "rung": solution.rung, "scaled": solution.fold is not None}
