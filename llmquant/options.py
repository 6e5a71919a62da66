"""What the command line says that is more than a number: sizes, lists, devices, and a recipe of many options.

Like all that `cli.py` imports, this does without torch until it is needed: help takes half a second.
"""

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.errors import RecipeError

if TYPE_CHECKING:
    from llmquant.recipe import Recipe

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


class PrecisionName(str, Enum):
    exact = "exact"
    int8 = "int8"


Precision = Annotated[PrecisionName, typer.Option(help="Of activations on the CPU; int8 is faster.")]

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "B": 1}


def parse_size(text: str | None, option: str = "--max-memory") -> int | None:
    """Bytes, from a number and a unit; typer.BadParameter if it is none."""
    if text is None:
        return None
    number, unit = next(((text[: -len(u)], f) for u, f in UNITS.items() if text.upper().endswith(u)), (text, 1))
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError) as error:
        raise typer.BadParameter(f"{option} {text}: write a number and a unit, as in 16GB") from error


def parse_percent(text: str | None, option: str = "--max-increase") -> float | None:
    """A fraction, from a percentage; typer.BadParameter if it is none."""
    try:
        return None if text is None else float(text.removesuffix("%")) / 100
    except ValueError as error:
        raise typer.BadParameter(f"{option} {text}: write a percentage, as in 5%") from error


def parse_ranks(text: str | None) -> list[int] | None:
    ranks = [] if text is None else text.split(",")
    if not all(rank.strip().isdecimal() and int(rank) for rank in ranks):
        raise typer.BadParameter(f"--tensor-parallel {text}: write numbers of ranks, as in 1,2,4,8")
    return [int(rank) for rank in ranks] if text is not None else None


def merged_recipe(path: Path | None, given: dict[str, Any]) -> "Recipe":
    """The recipe file, if any, with the options that were given laid over it."""
    from llmquant.recipe import Recipe, read_yaml

    values = read_yaml(path) if path else {}
    for key, value in given.items():
        if isinstance(value, dict):
            below = values.get(key, {})
            value = (below if isinstance(below, dict) else {}) | {k: v for k, v in value.items() if v is not None}
        if value not in (None, {}):
            values[key] = value
    return Recipe.from_dict(values, str(path) if path else "options")


def resolve_device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise typer.BadParameter(f"--device {device}: use auto, cpu, cuda or cuda:N") from error
    if kind not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device {device}: use auto, cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    return device


def target_of(bits: float | None, size: str | None, kl: float | None, choices: str | None) -> dict[str, Any]:
    """The recipe's `target` from the options."""
    try:
        listed = None if choices is None else [int(part) for part in choices.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--choices {choices}: write bits and commas, as in 4,8,16") from error
    return {"bits": bits, "size": parse_size(size, "--target-size"), "kl": kl, "choices": listed}
