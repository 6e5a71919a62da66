"""Runs of the pipeline in a process of their own, in which the k-th durable operation goes wrong.

Every durable change of the product goes through the functions of `checkpoint.durable`. Here they are wrapped, in a
forked child, to count the operations and to act at one of them. The product has no hook for this, and nothing of it
is replaced: the original function runs, or the process is dead.
"""

import errno
import hashlib
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant import plan as plan_module
from llmquant.checkpoint import durable
from llmquant.errors import LlmquantError
from llmquant.manifest import LOG
from llmquant.observer import Silent
from llmquant.pipeline import Options, quantize
from llmquant.recipe import Recipe

OPERATIONS = ("write_temp", "fsync", "replace", "append", "truncate", "remove", "make_directory")


DEFAULT = Options()


@dataclass(frozen=True)
class Fault:
    """What happens at the `at`-th durable operation, counted from 1; 0 is never."""

    at: int = 0
    action: str = "kill before"  # kill before | kill after | ENOSPC | EIO


@dataclass(frozen=True)
class Outcome:
    """How a run in a child ended."""

    killed: bool
    error: str | None  # the one line of an LlmquantError
    operations: int
    solved: int  # modules that were solved, not replayed


class Solved(Silent):
    def __init__(self) -> None:
        self.count = 0

    def solved(self, record: dict[str, Any]) -> None:
        self.count += 1


def run(
    model: Path, out: Path, recipe: Recipe, fault: Fault = Fault(), *, shard_bytes: int | None = None,
    options: Options = DEFAULT, observer: Solved | None = None,
) -> Outcome:  # fmt: skip
    """Quantize in a forked child."""

    def work() -> Outcome:
        if shard_bytes:
            plan_module.SHARD_BYTES = shard_bytes
        operations = arm(fault)
        watching = observer or Solved()
        error = None
        try:
            quantize(model, out, recipe, options, watching)
        except LlmquantError as caught:
            error = str(caught)
        return Outcome(False, error, operations(), watching.count)

    return in_child(work)


def in_child(work: Callable[[], Outcome]) -> Outcome:
    """Fork, work, and bring the outcome back; an exception that is not the product's own fails the test."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        try:
            payload = pickle.dumps(work())
        except BaseException:
            payload = pickle.dumps(traceback.format_exc())
        os.write(send, payload)
        os._exit(0)
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        payload = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return Outcome(True, None, 0, 0)
    outcome = pickle.loads(payload)  # noqa: S301  (our own child's)
    assert isinstance(outcome, Outcome), outcome
    return outcome


def arm(fault: Fault) -> Callable[[], int]:
    """Wrap the durable operations of this process. Returns their counter."""
    count = 0

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            mine = count == fault.at
            if mine and fault.action == "kill before":
                os.kill(os.getpid(), signal.SIGKILL)
            if mine and hasattr(errno, fault.action):
                code = getattr(errno, fault.action)
                raise OSError(code, os.strerror(code))
            result = original(*args, **kwargs)
            if mine and fault.action == "kill after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return operation

    for name in OPERATIONS:
        setattr(durable, name, wrap(getattr(durable, name)))
    return lambda: count


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file but the run log, which holds times; hidden files and folders included."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != LOG
    }
