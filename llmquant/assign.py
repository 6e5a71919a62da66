"""Which scheme each linear gets: the recipe, fitted to the shapes and to what the format can hold."""

from dataclasses import dataclass, replace
from math import gcd

from llmquant.errors import RecipeError
from llmquant.formats import FORMATS
from llmquant.model.layout import Group, Layer, Layout
from llmquant.recipe import Recipe
from llmquant.scheme import GROUP_SIZES, Scheme

FEWEST = min(size for size in GROUP_SIZES if size > 0)


@dataclass(frozen=True)
class Linear:
    """One linear of a decoder layer: what becomes of it, and why if it is not what the recipe says."""

    name: str
    m: int
    n: int
    scheme: Scheme | None  # None: kept in its original precision
    note: str = ""


def assign(group: Group, recipe: Recipe, layout: Layout) -> list[Linear]:
    """Decide the scheme of each linear of a group. Servers fuse linears that share an input, so they must be alike.

    Raises:
        RecipeError: overrides treat the members of the group differently.
    """
    wanted = {name: _requested(name, recipe) for name in group.linears}
    if len(set(wanted.values())) > 1:
        first, second = list(wanted)[:2]
        raise RecipeError(
            f"overrides: {first} and {second} share an input and are fused by servers, "
            f"but get {wanted[first]} and {wanted[second]}; match all of {', '.join(group.linears)} or none"
        )
    linears = [_settle(name, *layout.shapes[name], wanted[name], recipe, group) for name in group.linears]
    refused = next((linear for linear in linears if linear.scheme is None), None)
    return linears if refused is None else [replace(linear, scheme=None, note=refused.note) for linear in linears]


def _requested(linear: str, recipe: Recipe) -> Scheme | None:
    scheme: Scheme | None = recipe.scheme
    for override in recipe.overrides:
        if override.matches(linear):
            scheme = override.apply(scheme, recipe.scheme)
    return scheme


def _settle(name: str, m: int, n: int, scheme: Scheme | None, recipe: Recipe, group: Group) -> Linear:
    """Fit the requested scheme to the shape: the next smaller group that divides; keep what the format refuses.

    The groups of an expert divide its inner width as well as the model's: servers want one scheme for all of it.
    """
    if scheme is None:
        return Linear(name, m, n, None, "kept: the recipe skips it")
    if n < FEWEST:
        return Linear(name, m, n, None, f"kept: {n} columns are less than any group")
    note, divided = "", gcd(m, n) if group.expert else n
    if scheme.group_size > 0 and divided % scheme.group_size:
        fitting = [g for g in GROUP_SIZES if 0 < g < scheme.group_size and divided % g == 0]
        fitted = Scheme(scheme.bits, max(fitting, default=-1), scheme.symmetric)
        note = f"group size {scheme.group_size} does not divide {divided} columns: {fitted}"
        scheme = fitted
    if reason := FORMATS[recipe.format].refuse(m, n, scheme):
        return Linear(name, m, n, None, f"kept: {recipe.format} cannot hold it: {reason}")
    return Linear(name, m, n, scheme, note)


def check_mixture(recipe: Recipe, layout: Layout) -> None:
    """Raise RecipeError for what is not for mixtures of experts."""
    if not any(layer.mixture for layer in layout.layers):
        return
    if recipe.format != "compressed-tensors":
        raise RecipeError(
            f"format: transformers leaves the experts of {recipe.format} files random, with no more than a warning; "
            "use --format compressed-tensors"
        )
    if recipe.target:
        raise RecipeError("target: mixed precision is not measured for mixtures of experts; give one scheme")


def check_inside(recipe: Recipe, *, inside: bool) -> None:
    """Raise RecipeError for a layout that a language model inside of a model was never loaded in by anybody."""
    if inside and recipe.format != "compressed-tensors":
        raise RecipeError(
            f"format: {recipe.format} is not written where a model has more than its language model; "
            "use --format compressed-tensors"
        )


def check_experts(layer: Layer, linears: dict[str, Linear]) -> None:
    """Raise RecipeError unless all experts of a layer are alike, which servers compute at once."""
    experts = [linears[name] for name in layer.experts]
    if other := next((each for each in experts if each.scheme != experts[0].scheme), None):
        raise RecipeError(
            f"overrides: {experts[0].name} and {other.name} are experts of a layer, which servers compute together, "
            f"but get {experts[0].scheme or 'kept'} and {other.scheme or 'kept'}; give all of them one scheme"
        )
