"""A finished directory on the Hub: verified, in one commit, and however often it takes.

Weights go up file by file, and nothing of them shows before the one commit at the end that holds everything: no one
can load half a model. The Hub keeps files that it was sent by their sha256, so that a push which is given again sends
only those that are not there yet; huggingface_hub asks for them. Tokens are where that library looks: HF_TOKEN, or
the login.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from llmquant.calibration.batches import Calibration
from llmquant.card import CARD, model_card
from llmquant.errors import HubError
from llmquant.manifest import LOG, MANIFEST, read_manifest
from llmquant.observer import Observer
from llmquant.pipeline import Options, quantize
from llmquant.plan import Plan, Unit
from llmquant.recipe import Recipe
from llmquant.verify import verify_checkpoint

PAUSES = (1, 2, 4, 8, 16, 32)  # seconds between attempts, or longer where the Hub says so
LONGEST = 300  # that it may say
OURS = re.compile(r"model.*\.safetensors(\.index\.json)?")  # what an earlier push may have left
T = TypeVar("T")


def push(
    directory: str | Path,
    name: str,
    *,
    public: bool = False,
    base_model: str | None = None,
    sending: Callable[[str], None] = lambda file: None,
) -> str:
    """Verify `directory` and make it the content of the repository `name` (ORG/NAME). Returns the commit's address.

    A README.md in the directory is its card; otherwise one is written for the repository. `sending` is told each file.

    Raises:
        VerifyError: the directory is not whole.
        HubError: the Hub refuses, cannot be reached, or shows to everyone what was not said to be public.
    """
    directory = Path(directory)
    verify_checkpoint(directory)
    files = [*read_manifest(directory), MANIFEST, LOG]
    own = directory / CARD
    card = own.read_bytes() if own.is_file() else model_card(directory, name, base_model).encode()
    additions = [*(CommitOperationAdd(file, directory / file) for file in files), CommitOperationAdd(CARD, card)]
    api = HfApi()
    with _one_line(name):
        info = _repository(api, name, public=public)
        for addition in additions:
            sending(addition.path_in_repo)
            retried(partial(api.preupload_lfs_files, name, [addition], free_memory=False))
        there = [sibling.rfilename for sibling in info.siblings or []]
        stale = [CommitOperationDelete(file) for file in there if OURS.fullmatch(file) and file not in files]
        message = f"Push {directory.resolve().name} with llmquant"
        commit = retried(
            lambda: api.create_commit(name, (*additions, *stale), commit_message=message, parent_commit=info.sha)
        )
    return str(commit.commit_url)


def quantize_and_push(
    name: str, model: str | Path, out: Path, recipe: Recipe, options: Options, observer: Observer
) -> Plan:
    """`pipeline.quantize`, whose shards go to the repository `name` while it runs, and the rest at the end.

    Raises:
        LlmquantError: as `quantize` and `push` do.
    """
    ahead = Ahead(observer, out, name)
    plan = quantize(model, out, recipe, options, ahead)
    ahead.wait()
    push(out, name)
    return plan


class Ahead:
    """An observer of a run that sends each shard as soon as it is final, beside the run; `push` then sends the rest.

    What fails here is not lost: it is missing when `push` asks, which sends it again or says why it cannot.
    """

    def __init__(self, observer: Observer, out: Path, name: str) -> None:
        """Raises HubError, before any work, if the repository cannot be written."""
        self._observer, self._out, self._name, self._api = observer, out, name, HfApi()
        self._files: SimpleQueue[Path | None] = SimpleQueue()
        self._merged = True
        with _one_line(name):
            _repository(self._api, name, public=False)
        self._sender = Thread(target=self._send, daemon=True)  # which a run that is stopped does not wait for
        self._sender.start()

    def sensed(self, layer: str, left: int) -> None:
        self._observer.sensed(layer, left)

    def planned(self, plan: Plan, calibration: Calibration | None, done: int) -> None:
        self._merged = plan.merged  # into one file at the end: its parts are none of the repository's files
        self._observer.planned(plan, calibration, done)

    def solved(self, record: dict[str, Any]) -> None:
        self._observer.solved(record)

    def finished(self, unit: Unit) -> None:
        for shard in () if self._merged else unit.shards:
            self._files.put(self._out / shard.file)
        self._observer.finished(unit)

    def wait(self) -> None:
        """Until all that was finished is sent."""
        self._files.put(None)
        self._sender.join()

    def _send(self) -> None:
        while (path := self._files.get()) is not None:
            addition = CommitOperationAdd(path.name, path)
            with suppress(Exception):  # of any transport; see the class
                retried(partial(self._api.preupload_lfs_files, self._name, [addition]))


def _repository(api: HfApi, name: str, *, public: bool) -> ModelInfo:
    """The repository, made if need be. HubError if everyone can read what was not said to be public."""
    retried(lambda: api.create_repo(name, private=not public, exist_ok=True))
    info = retried(lambda: api.model_info(name))
    if info.private is False and not public:
        raise HubError(f"{name}: exists and everyone can read it; say --public, or choose another name")
    return info


@contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Every failure as a HubError."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the client passes on what its transports raise: httpx, xet, OSError, ValueError
        raise HubError(f"{name}: {_reason(error)}") from error


def retried(call: Callable[[], T]) -> T:
    """The result of `call`, repeated while the Hub is busy or out of reach."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            cause = _cause(error)
            if not _passing(cause):
                raise
            time.sleep(max(pause, _asked_to_wait(cause)))
    return call()


def _cause(error: BaseException) -> BaseException:
    """What the Hub said, or the first that went wrong: the client wraps it."""
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _passing(cause: BaseException) -> bool:
    """Whether another attempt may succeed: too many requests, trouble of the server's, or no way to it."""
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code == 429 or cause.response.status_code >= 500
    return type(cause).__module__.startswith("httpx") or isinstance(cause, ConnectionError | TimeoutError)


def _asked_to_wait(cause: BaseException) -> float:
    """The Retry-After of an answer, in seconds."""
    said = cause.response.headers.get("Retry-After", "") if isinstance(cause, HfHubHTTPError) else ""
    return min(float(said), LONGEST) if said.isdigit() else 0.0


def _reason(error: Exception) -> str:
    """One line, and what to do."""
    cause = _cause(error)
    if isinstance(cause, HFValidationError):
        return "is no name of a repository; give ORG/NAME"
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        hints = {
            401: "the Hub does not know who this is; set HF_TOKEN, or run `hf auth login`",
            403: "the token may not write there; choose another name, or a token with write access",
            412: "someone else has changed the repository meanwhile; give the same command again",
        }
        return hints.get(status, f"the Hub answered {status}; the same command continues where this one stopped")
    said = str(cause).partition("\n")[0][:200]
    return f"cannot be pushed ({type(cause).__name__}: {said}); the same command continues where this one stopped"
