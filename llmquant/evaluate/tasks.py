"""Tasks of lm-eval on our runtime: its prompts, its metrics, our model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llmquant.errors import RecipeError
from llmquant.model.tokenizer import load_tokenizer
from llmquant.runtime.loader import load


@dataclass(frozen=True)
class Choice:
    """Which tasks, and how much of them."""

    names: tuple[str, ...]
    path: Path | None = None  # a directory with task files beside those that lm-eval brings
    limit: int | None = None  # the first so many samples of each
    fewshot: int | None = None  # as each task has it, if not given


@dataclass(frozen=True)
class Scores:
    """What lm-eval measured, by task and metric; errors are its standard errors."""

    directory: str
    scores: dict[str, dict[str, float]]
    errors: dict[str, dict[str, float]]
    samples: dict[str, int]
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "directory": self.directory,
            "tasks": self.scores,
            "standard_errors": self.errors,
            "samples": self.samples,
            "protocol": self.protocol,
        }


def run_tasks(directory: Path, choice: Choice, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Scores:
    """Ask lm-eval's questions of a checkpoint, packed or not.

    Raises:
        RecipeError: lm-eval is not installed, does not know a task, or cannot load its data.
        CheckpointError: the directory cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RecipeError("--tasks: needs the lm-eval package; pip install 'llmquant[eval]'") from error
    names = list(choice.names)
    manager = _manager(names, choice.path)
    host = HFLM(pretrained=load(directory, dtype, device=device), tokenizer=load_tokenizer(directory))
    try:
        found = lm_eval.simple_evaluate(
            host, tasks=names, task_manager=manager, limit=choice.limit, num_fewshot=choice.fewshot
        )
    except (OSError, ValueError, KeyError) as error:  # whatever the data of a task may fail with
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RecipeError(f"--tasks {','.join(names)}: {reason}; check the task and the connection") from error
    shots = ", ".join(f"{name} {count}-shot" for name, count in found["n-shot"].items())
    limited = f", first {choice.limit} samples" if choice.limit else ""
    kind = str(dtype).removeprefix("torch.")
    return Scores(
        str(directory),
        _numbers(found["results"], stderr=False),
        _numbers(found["results"], stderr=True),
        {name: count["effective"] for name, count in found["n-samples"].items()},
        f"lm-eval {version('lm-eval')}, {shots}{limited}, {kind}",
    )


def _manager(names: Sequence[str], path: Path | None) -> Any:
    """What finds the tasks: those of `path`, and lm-eval's own, which take longer to look through, where needed."""
    from lm_eval.tasks import TaskManager

    unknown = list(names)
    for own in (False, True) if path else (True,):
        manager = TaskManager(include_path=str(path) if path else None, include_defaults=own)
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise RecipeError(f"--tasks {unknown[0]}: lm-eval knows no such task; see `lm-eval ls tasks`, or give --task-path")


def _numbers(results: dict[str, dict[str, Any]], *, stderr: bool) -> dict[str, dict[str, float]]:
    """lm-eval's `metric,filter` -> value; a filter is named only where it is not the plain one."""
    return {
        task: {
            key.removesuffix(",none").replace("_stderr", ""): float(value)
            for key, value in metrics.items()
            if "," in key and ("_stderr" in key) == stderr and isinstance(value, float | int)
        }
        for task, metrics in results.items()
    }


def side_by_side(found: Sequence[Scores]) -> list[tuple[str, ...]]:
    """A row for each task and metric: each checkpoint's value with its standard error."""

    def shown(scores: Scores, task: str, metric: str) -> str:
        return f"{scores.scores[task][metric]:.4f} ± {scores.errors[task].get(metric, math.nan):.4f}"

    metrics = [(task, metric) for task, values in found[0].scores.items() for metric in values]
    return [(task, metric, *(shown(scores, task, metric) for scores in found)) for task, metric in metrics]
