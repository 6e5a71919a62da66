"""Every decision, taken before any work: the Plan.

It is what `--dry-run` prints, what resume compares and what the loop follows without a choice of
its own: the scheme of every linear, the file of every tensor, bytes, memory and time.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
import transformers

from llmquant.assign import Linear, assign, check_experts, check_inside, check_mixture
from llmquant.calibration.batches import Calibration
from llmquant.checkpoint.reader import Checkpoint
from llmquant.errors import CheckpointError, OutputError, RecipeError
from llmquant.estimate import Estimate, estimate
from llmquant.formats import FORMATS
from llmquant.model.language import below, by_any_name, every_expert
from llmquant.model.layout import Layer, Layout, derive_layout
from llmquant.model.shell import Shell
from llmquant.native import active_backend
from llmquant.notes import notes
from llmquant.recipe import Recipe
from llmquant.scheme import Scheme
from llmquant.version import __version__

SHARD_BYTES = 5_000_000_000  # the Hub's own default
OUTSIDE = "outside"  # the unit of all tensors that belong to no decoder layer

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NOT_WEIGHT = {".weight_shape", ".g_idx"}  # bookkeeping that no kernel reads

Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Shard:
    """One output file and the tensors in it, in file order."""

    file: str
    tensors: dict[str, Spec]


@dataclass(frozen=True)
class Stack:
    """Linears that share an input and a scheme: solved as one matrix, with one factorization.

    Scales on their columns can be folded into the module in front: a norm, or the last rows of a linear, or neither.
    """

    linears: tuple[Linear, ...]
    scheme: Scheme
    norm: str | None = None
    source: str | None = None
    normed: bool = True  # a norm makes their input, whether or not a scale can be folded into it
    expert: bool = False  # their input are the tokens that are sent to an expert

    @property
    def n(self) -> int:
        return self.linears[0].n


@dataclass(frozen=True)
class Unit:
    """One decoder layer, or all that is outside of them: the unit of work, of crash and of resume."""

    name: str
    layer: Layer | None
    linears: dict[str, Linear]
    kept: tuple[str, ...]  # tensors copied as they are
    shards: tuple[Shard, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec_bytes(spec) for shard in self.shards for spec in shard.tensors.values())

    @property
    def stacks(self) -> list[Stack]:
        """The problems to solve, in forward order."""
        if self.layer is None:
            return []
        quantized = {name for name, linear in self.linears.items() if linear.scheme}
        sources = {target: source for source, target in self.layer.folds if source in quantized}
        stacks = []
        for group in self.layer.groups:
            linears = tuple(self.linears[name] for name in group.linears)
            if linears[0].scheme:
                norm = group.norm if group.foldable and self.layer.norm_offset is not None else None
                source = sources.get(linears[0].name) if len(linears) == 1 else None
                stacks.append(Stack(linears, linears[0].scheme, norm, source, group.norm is not None, group.expert))
        return stacks


@dataclass(frozen=True)
class Plan:
    """The whole run. Equal plans on equal inputs give equal bytes."""

    recipe: Recipe
    model_type: str
    units: tuple[Unit, ...]
    merged: bool  # small enough for a single model.safetensors
    notes: tuple[str, ...]
    bytes_in: int
    estimate: Estimate
    all_linears: tuple[str, ...]  # of the model, the output head and what servers make a linear included
    inside: bool  # see Shell, and the next
    towers: tuple[str, ...]

    @property
    def bytes_out(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    @cached_property
    def linears(self) -> list[Linear]:
        return list(chain.from_iterable(unit.linears.values() for unit in self.units))

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        return {linear.name: linear.scheme for linear in self.linears if linear.scheme}

    def to_dict(self) -> dict[str, Any]:
        """The plan as `--dry-run --json` prints it."""
        return {
            "model_type": self.model_type,
            "recipe": self.recipe.model_dump(mode="json"),
            "linears": {linear.name: str(linear.scheme) if linear.scheme else "kept" for linear in self.linears},
            "files": [shard.file for unit in self.units for shard in unit.shards]
            if not self.merged
            else ["model.safetensors"],
            "notes": list(self.notes),
            "bits_per_weight": self.bits_per_weight(),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "memory_bytes": self.estimate.memory,
            "seconds": self.estimate.seconds,
            "calibration_tokens": self.estimate.tokens,
        }

    def bits_per_weight(self) -> float:
        """Stored bits, scales and zero points included, per weight of the quantized linears."""
        stored = weights = 0
        for linear in self.linears:
            if linear.scheme:
                stored += stored_bits(linear.m, linear.n, linear.scheme, self.recipe.format)
                weights += linear.m * linear.n
        return stored / weights

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(unit.layer for unit in self.units if unit.layer)

    def fingerprint(self, shell: Shell, calibration: Calibration | None) -> dict[str, Any]:
        """Everything that the output's bytes depend on. A run resumes only where all of it is unchanged."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "input": shell.source.fingerprint(),
            "calibration": calibration.digest if calibration else "",
            "versions": {"llmquant": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
            "machine": {
                "device": torch.cuda.get_device_name(shell.device) if shell.device.type == "cuda" else "cpu",
                "instructions": torch.backends.cpu.get_cpu_capability(),
                "backend": active_backend(shell.device.type),
                "dtype": str(shell.dtype),
                "threads": torch.get_num_threads(),
            },
        }


def make_plan(recipe: Recipe, shell: Shell, max_memory: int | None = None) -> Plan:
    """Decide everything.

    Raises:
        RecipeError: the recipe contradicts itself or the model.
        OutputError: the run would need more than `max_memory` bytes.
    """
    _check_recipe(recipe)
    layout = derive_layout(shell.config, trust_remote_code=shell.source.trust_remote_code)
    check_mixture(recipe, layout)
    check_inside(recipe, inside=shell.inside)
    drafts = [_draft_outside(shell, layout), *(_draft_layer(layer, recipe, shell, layout) for layer in layout.layers)]
    total = sum(spec_bytes(spec) for draft in drafts for spec in draft.specs.values())
    units = _name_shards(drafts, merged=total <= SHARD_BYTES)
    if not any(linear.scheme for unit in units for linear in unit.linears.values()):
        raise RecipeError("recipe: no linear is left to quantize; loosen `overrides` or choose another group size")
    cost = estimate(recipe, shell, layout)
    plan = Plan(
        recipe=recipe,
        model_type=layout.model_type,
        units=units,
        merged=total <= SHARD_BYTES,
        notes=notes(units, recipe, shell, layout, cost),
        bytes_in=sum(info.nbytes for info in shell.source.tensors.values()),
        estimate=cost,
        all_linears=(*layout.shapes, *_routers(shell, layout)),
        inside=shell.inside,
        towers=shell.towers,
    )
    quantization_config(plan)  # a layout may refuse the schemes together
    if max_memory is not None and plan.estimate.memory > max_memory:
        raise OutputError(
            f"--max-memory: this run needs about {plan.estimate.memory / 1e9:.1f} GB, "
            f"allowed are {max_memory / 1e9:.1f} GB; lower --samples or --seq-len"
        )
    return plan


def _routers(shell: Shell, layout: Layout) -> list[str]:
    """Those that are no linears here, by the names that servers have, which make linears of them."""
    return [shell.stored_prefix(name) for name in layout.kept if name not in layout.shapes]


def quantization_config(plan: Plan) -> dict[str, Any]:
    """The `quantization_config` block of config.json; RecipeError if the layout cannot say so."""
    experts = {name: every_expert(layer.name) for layer in plan.layers for name in layer.experts}
    by_name = by_any_name if plan.inside else str
    told = lambda name: experts.get(name) or by_name(name)  # noqa: E731
    schemes = {told(name): scheme for name, scheme in plan.schemes.items()}
    skipped = list(dict.fromkeys(told(name) for name in plan.all_linears if name not in plan.schemes))
    if plan.recipe.format == "compressed-tensors":  # whose one scheme would be that of all linears there are
        skipped += map(below, plan.towers)
    return FORMATS[plan.recipe.format].config_block(schemes, skipped)


def spec_bytes(spec: Spec) -> int:
    dtype, shape = spec
    return dtype.itemsize * torch.Size(shape).numel()


def stored_bits(m: int, n: int, scheme: Scheme, format: str) -> int:
    """Of codes, scales and zero points of a linear."""
    specs = FORMATS[format].specs("", m, n, scheme, torch.bfloat16)
    return 8 * sum(spec_bytes(spec) for name, spec in specs.items() if name not in NOT_WEIGHT)


def check_original(source: Checkpoint) -> None:
    """Raise CheckpointError if the input is quantized already."""
    quantized = source.config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "an unknown method") if isinstance(quantized, dict) else quantized
        raise CheckpointError(f"{source.root}: is quantized already ({method}); start from the original checkpoint")


def _check_recipe(recipe: Recipe) -> None:
    if recipe.method == "rtn" and recipe.solver.train:
        raise RecipeError("method: rtn reads no text, so that nothing can be trained; choose another method or preset")
    schemes = [recipe.scheme, *(override.apply(None, recipe.scheme) for override in recipe.overrides)]
    if recipe.format == "gptq" and any(scheme and not scheme.symmetric for scheme in schemes):
        raise RecipeError(
            "format: servers refuse asymmetric GPTQ files; use --format awq or compressed-tensors, or --sym"
        )
    if recipe.format == "awq" and any(scheme and scheme.symmetric for scheme in schemes):
        raise RecipeError(
            "format: awq files store zero points, which symmetric weights waste; use --asym, or --format gptq"
        )


@dataclass
class _Draft:
    """A unit before its files have names."""

    name: str
    layer: Layer | None
    linears: dict[str, Linear]
    kept: tuple[str, ...]
    specs: dict[str, Spec]


def _draft_outside(shell: Shell, layout: Layout) -> _Draft:
    inside = tuple(f"{layer.name}." for layer in layout.layers)
    kept = (*(name for name in shell.names if not name.startswith(inside)), *shell.extra)
    return _Draft(OUTSIDE, None, {}, kept, dict(chain.from_iterable(_stored_specs(shell, name) for name in kept)))


def _draft_layer(layer: Layer, recipe: Recipe, shell: Shell, layout: Layout) -> _Draft:
    linears = {linear.name: linear for group in layer.groups for linear in assign(group, recipe, layout)}
    check_experts(layer, linears)
    replaced = {f"{linear.name}.weight": linear for linear in linears.values() if linear.scheme}
    specs: dict[str, Spec] = {}
    for name in shell.part(layer.name):
        linear = replaced.get(name)
        if linear is None or linear.scheme is None:
            specs |= _stored_specs(shell, name)
        else:
            prefix, dtype = shell.stored_prefix(linear.name), shell.stored_dtype(name)
            if dtype not in WEIGHT_DTYPES:
                raise CheckpointError(f"{name}: is stored as {dtype}; convert the checkpoint to BF16 first")
            specs |= FORMATS[recipe.format].specs(prefix, linear.m, linear.n, linear.scheme, dtype)
    kept = tuple(name for name in shell.part(layer.name) if name not in replaced)
    return _Draft(layer.name, layer, linears, kept, specs)


def _stored_specs(shell: Shell, name: str) -> list[tuple[str, Spec]]:
    """Of a tensor that is copied, by the names that it has in the checkpoint."""
    infos = {part: shell.source.tensors[part] for part in shell.stored_names(name)}
    return [(part, (info.dtype, info.shape)) for part, info in infos.items()]


def _name_shards(drafts: list[_Draft], *, merged: bool) -> tuple[Unit, ...]:
    """Cut each unit into files of at most SHARD_BYTES and number them all."""
    cut = [shards_of(draft.specs) for draft in drafts]
    total = sum(len(files) for files in cut)
    pattern = ".llmquant/part-{:05d}.safetensors" if merged else "model-{:05d}-of-" + f"{total:05d}.safetensors"
    numbers = iter(range(1, total + 1))
    return tuple(
        Unit(
            draft.name,
            draft.layer,
            draft.linears,
            draft.kept,
            tuple(Shard(pattern.format(next(numbers)), tensors) for tensors in files),
        )
        for draft, files in zip(drafts, cut, strict=True)
    )


def shards_of(specs: dict[str, Spec]) -> list[dict[str, Spec]]:
    """Tensors in files of at most SHARD_BYTES, unless a single one is larger."""
    files: list[dict[str, Spec]] = []
    size = 0
    for name, spec in specs.items():
        size += spec_bytes(spec)
        if not files or size > SHARD_BYTES:
            files.append({})
            size = spec_bytes(spec)
        files[-1][name] = spec
    return files
