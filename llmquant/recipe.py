"""What the user asks for: one flat, strict document. Unknown keys are refused with the nearest name."""

import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from llmquant.errors import RecipeError
from llmquant.scheme import BITS, Scheme

Method = Literal["rtn", "awq", "gptq", "awq+gptq", "auto"]
Format = Literal["compressed-tensors", "gptq", "awq"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationRecipe(_Strict):
    """Which text the solver sees."""

    source: str = "builtin"  # builtin | self | FILE.jsonl | FILE.txt | hf:NAME
    samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=512, ge=8)


class SolverRecipe(_Strict):
    """How the integers are found. See docs/accuracy.md for what each choice is worth."""

    order: Literal["group", "static"] = "group"  # of GPTQ's columns: by group, or wherever they are
    weight: Literal["diagonal", "pivot"] = "diagonal"  # of grids chosen before the first column
    damping: float = Field(default=0.01, gt=0, le=1)  # of the Hessian, a fraction of its mean diagonal
    shrinkage: float = Field(default=0.3, ge=0, lt=1)  # of the Hessian towards its diagonal
    correction: float = Field(default=0.75, ge=0, le=1)  # towards the activations of the original model
    refine: int = Field(default=0, ge=0)  # passes of scale refit and coordinate descent after the rounding
    awq_loss: Literal["gram", "block"] = "gram"  # what AWQ's scales are chosen by
    train: int = Field(default=0, ge=0)  # steps of trained rounding for each layer


# What a preset stands for. Whatever a recipe says itself goes before it.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "gptq", "solver": {"correction": 0.0}},
    "default": {},
    "best": {"solver": {"refine": 1, "train": 40}},
}


class Target(_Strict):
    """What mixed precision is to reach: exactly one of bits, size and KL. Linears that an override matches stay as it
    says; each of the others gets the bits and the group size that lose least, linears that share an input alike."""

    bits: float | None = Field(default=None, gt=0)  # per weight of the layers' linears, scales included
    size: int | None = Field(default=None, gt=0)  # of all tensors of the checkpoint, in bytes
    kl: float | None = Field(default=None, gt=0)  # from the original, predicted, in nats
    choices: tuple[int, ...] = (4, 8, 16)  # bits to choose from; 16: the linear is kept as it is

    @model_validator(mode="after")
    def _one(self) -> "Target":
        if sum(value is not None for value in (self.bits, self.size, self.kl)) != 1:
            raise ValueError("give exactly one of bits, size and kl")
        if not self.choices or not set(self.choices) <= {*BITS, 16}:
            raise ValueError(f"choices {self.choices}: choose from {(*BITS, 16)}")
        return self


class Override(_Strict):
    """A different scheme for the linears whose full name matches; later overrides win.

    `match` is an exact name or `re:` and a regular expression for the whole name.
    """

    match: str
    skip: bool = False  # leave the linear in its original precision
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None

    def matches(self, linear: str) -> bool:
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], linear) is not None
        return self.match == linear

    def apply(self, scheme: Scheme | None, default: Scheme) -> Scheme | None:
        if self.skip:
            return None
        base = scheme or default
        return Scheme(
            self.bits or base.bits,
            self.group_size or base.group_size,
            base.symmetric if self.symmetric is None else self.symmetric,
        )


class Recipe(_Strict):
    """One quantization run, completely."""

    version: Literal[1] = 1
    preset: Literal["fast", "default", "best"] = "default"
    method: Method = "auto"
    scheme: Scheme = Scheme()
    format: Format = "compressed-tensors"
    calibration: CalibrationRecipe = CalibrationRecipe()
    solver: SolverRecipe = SolverRecipe()
    overrides: tuple[Override, ...] = ()
    tensor_parallel: tuple[PositiveInt, ...] = ()  # numbers of ranks that servers will use: checked, not changed by
    target: Target | None = None  # set: bits and group sizes are measured for, and stand in `overrides` afterwards
    seed: int = 0

    @property
    def calibrated(self) -> bool:
        """Whether the method reads text at all."""
        return self.method != "rtn"

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> "Recipe":
        """Validate a mapping.

        Raises:
            RecipeError: names the key or value, and the nearest key that exists.
        """
        try:
            recipe = cls.model_validate(_with_preset(values))
            for override in recipe.overrides:
                override.matches("")  # compiles the expression
        except ValidationError as error:
            raise RecipeError(f"{where}: {_first_problem(error)}") from error
        except re.error as error:
            raise RecipeError(f"{where}: overrides: not a regular expression: {error}") from error
        return recipe

    @classmethod
    def from_yaml(cls, path: Path) -> "Recipe":
        """Read a recipe file.

        Raises:
            RecipeError: the file cannot be read, or `from_dict` refuses its content.
        """
        return cls.from_dict(read_yaml(path), str(path))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file.

    Raises:
        RecipeError: it cannot be read, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping such as `method: gptq`; found {type(values).__name__}")
    return values


def _with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """The mapping with what its preset adds to it."""
    preset = PRESETS.get(str(values.get("preset")), {})
    merged = preset | values
    below = values.get("solver", {})
    if "solver" in preset and isinstance(below, dict):
        merged["solver"] = preset["solver"] | below
    return merged


MODELS = (Recipe, CalibrationRecipe, SolverRecipe, Override, Target)
KEYS = sorted({name for model in MODELS for name in model.model_fields})


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: {problem['msg']}"
    near = difflib.get_close_matches(str(problem["loc"][-1]), KEYS, 1)
    return f"{key}: unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(KEYS)}")
