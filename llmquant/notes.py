"""What a plan says of itself in words: what departs from the recipe, what is kept, and what clients make of it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from llmquant.assign import Linear
from llmquant.estimate import Estimate
from llmquant.formats import FORMATS
from llmquant.model.layout import Layout
from llmquant.model.shell import Shell
from llmquant.recipe import Recipe
from llmquant.tensor_parallel import refuse_heads, refuse_linear

if TYPE_CHECKING:
    from llmquant.plan import Stack, Unit


def notes(units: tuple["Unit", ...], recipe: Recipe, shell: Shell, layout: Layout, cost: Estimate) -> tuple[str, ...]:
    """One line for each thing that somebody who runs this ought to know."""
    return (
        *_linear_notes(units),
        *_outside_notes(shell),
        *_kept_notes(shell, layout),
        *_caveats(units, recipe),
        *_tensor_parallel_notes(units, recipe, shell),
        *_spill_notes(cost),
    )


def _linear_notes(units: tuple["Unit", ...]) -> list[str]:
    """What departs from the recipe: which linears, in how many layers, and why."""
    return _once((unit, linear, linear.note) for unit in units for linear in unit.linears.values() if linear.note)


def _once(found: Iterable[tuple["Unit", Linear, str]]) -> list[str]:
    """Each note once, with the linears that it is about."""
    where: dict[str, dict[str, set[str]]] = {}
    for unit, linear, note in found:
        leaf = linear.name.removeprefix(unit.name + ".")
        where.setdefault(note, {}).setdefault(leaf, set()).add(unit.name)
    return [
        f"{', '.join(leaves)} in {len(set().union(*leaves.values()))} layers: {note}" for note, leaves in where.items()
    ]


def _tensor_parallel_notes(units: tuple["Unit", ...], recipe: Recipe, shell: Shell) -> list[str]:
    """For each number of ranks that the recipe names: which linears a server cannot cut for them, and why."""
    found = []
    for degree in recipe.tensor_parallel:
        if reason := refuse_heads(shell.config, degree):
            found.append(f"tensor parallel {degree}: {reason}")
        refused = _once(
            (unit, linear, reason)
            for unit in units
            for stack in unit.stacks
            for linear in stack.linears
            if (reason := _refuse_cut(stack, linear, recipe, shell, degree))
        )
        found += [f"tensor parallel {degree}: {note}" for note in refused]
    return found


def _refuse_cut(stack: "Stack", linear: Linear, recipe: Recipe, shell: Shell, degree: int) -> str | None:
    return refuse_linear(linear, stack.scheme, FORMATS[recipe.format], shell.config, degree, normed=stack.normed)


def _outside_notes(shell: Shell) -> list[str]:
    found = []
    head = shell.model.get_output_embeddings()
    if head is not None:
        tied = getattr(shell.config, "tie_word_embeddings", False)
        found.append("lm_head: tied to the embedding, kept" if tied else "lm_head: kept in its original precision")
    if shell.towers:
        found.append(f"{', '.join(shell.towers)}: beside the language model, copied as they are")
    elif shell.extra:
        found.append(f"{len(shell.extra)} tensors are not part of the model and are copied ({shell.extra[0]}, ...)")
    return found


def _kept_notes(shell: Shell, layout: Layout) -> list[str]:
    found = [f"{len(layout.kept)} routers, gates and the like: kept in their original precision"] if layout.kept else []
    if layout.strays:
        names = [f"{layer.name}." for layer in layout.layers]
        owners = [next(name for name in names if stray.startswith(name)) for stray in layout.strays]
        leaves = map(str.removeprefix, layout.strays, owners)
        found.append(f"{', '.join(dict.fromkeys(leaves))} in {len(set(owners))} layers: no linear's, kept")
    if any(parts[1:] for parts in shell.names.values()):
        found.append(
            "transformers alone fails on tensors that it puts together from several; `import llmquant` does not"
        )
    if shell.lonely_experts:
        found.append("transformers alone leaves these experts random, with a warning; `import llmquant` loads them")
    return found


def _caveats(units: tuple["Unit", ...], recipe: Recipe) -> list[str]:
    schemes = {linear.scheme for unit in units for linear in unit.linears.values() if linear.scheme}
    found = FORMATS[recipe.format].caveats(schemes)
    if any(stack.expert and not stack.scheme.symmetric for unit in units for stack in unit.stacks):
        found.append("transformers refuses asymmetric experts")
    return found


def _spill_notes(cost: Estimate) -> list[str]:
    size = f"{cost.spilled / 1e9:.1f} GB"
    return [f"{size} of activations are kept in a file in the output directory"] if cost.spilled else []
