"""One token of every request in turn, in a thread of its own.

Each request has its own cache and is computed by itself, so that an answer does not depend on what else is asked: with
temperature 0 or a seed it is the same whether the server is busy or not, and what fails fails alone.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llmquant.runtime.decode import CACHE
from llmquant.server.reader import Reader
from llmquant.server.sampling import Sampler, Sampling

CHUNK = 2048  # tokens of a prompt that pass the model at once; others wait so long for their next token


class Progress(NamedTuple):
    """One more token."""

    text: str  # may be empty
    finished: str | None  # "stop" or "length"


Event = Progress | Exception


@dataclass(eq=False)
class Job:
    """A request on its way.

    Attributes:
        most: new tokens, 1 or more.
        tell: is called in the engine's thread, and must not wait.
        cancelled: set it, and nobody is told anything more.
    """

    ids: list[int]
    most: int
    sampling: Sampling
    stops: tuple[str, ...]
    tell: Callable[[Event], object]
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def tokens(self) -> int:
        """That its cache may come to hold."""
        return len(self.ids) + self.most


class Full(Exception):
    """As many requests wait as may wait."""


class _Turn(NamedTuple):
    job: Job
    steps: Iterator[Progress | None]


class Engine:
    """Computes answers with a model that nothing else uses.

    Attributes:
        device: where it computes, "cpu" or "cuda".
        active: requests whose turn comes.
        waiting: requests that will follow, in the order in which they came.
        room: tokens that the caches of all active requests may hold together.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Tokenizer, ends: frozenset[int], *, at_once: int, queue: int, room: int
    ) -> None:
        """`ends` are tokens that end an answer; `at_once` requests are active, `queue` of them wait, at most."""
        self.room = room
        self._model, self._tokenizer, self._ends = model, tokenizer, ends
        self.device: str = model.device.type
        self.active: list[_Turn] = []
        self.waiting: deque[Job] = deque()
        self._at_once, self._queue = at_once, queue
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="llmquant-engine", daemon=True)
        self._thread.start()

    @property
    def reserved(self) -> int:
        """Tokens that active requests may come to hold."""
        return sum(turn.job.tokens for turn in self.active)

    def submit(self, job: Job) -> None:
        """Raises Full; ValueError if it would wait forever, as there is no room for it alone."""
        if job.tokens > self.room:
            raise ValueError(f"{job.tokens} tokens, but caches have room for {self.room}")
        with self._changed:
            self.waiting = deque(each for each in self.waiting if not each.cancelled.is_set())
            if len(self.waiting) >= self._queue:
                raise Full
            self.waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Forget what is not finished, and return when the thread has ended."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while self._admit():
                self.active = [turn for turn in self.active if self._advance(turn)]

    def _admit(self) -> bool:
        """Wait until there is something to do; False if there never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self.active or self.waiting or self._closed)
            while self.waiting and len(self.active) < self._at_once:
                job = self.waiting[0]
                if not job.cancelled.is_set():
                    if self.reserved + job.tokens > self.room:
                        break  # and nobody overtakes it: it would never have its turn
                    self.active.append(_Turn(job, self._steps(job)))
                self.waiting.popleft()
            return not self._closed

    def _advance(self, turn: _Turn) -> bool:
        """One token, or one more part of the prompt; whether there is more to come."""
        job, steps = turn
        if job.cancelled.is_set():
            return False
        event: Event | None
        try:
            event = next(steps)
        except Exception as error:  # whatever it is, it is this request's and must not end the others
            event = error.with_traceback(None)  # which would keep the cache
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
        if event is None:
            return True
        with suppress(RuntimeError):  # who asked is gone, and its event loop with it
            job.tell(event)
        return isinstance(event, Progress) and event.finished is None

    def _steps(self, job: Job) -> Iterator[Progress | None]:
        """Each new token, and None for each part of the prompt but the last."""
        sampler, reader = Sampler(job.sampling), Reader(self._tokenizer, job.stops)
        cache, ids = DynamicCache(config=self._model.config), list(job.ids)
        for start in range(0, len(ids), CHUNK):
            if start:
                yield None
            logits = self._forward(ids[start : start + CHUNK], cache)
        for made in count(1):
            token = sampler.choose(logits, ids)
            ids.append(token)
            text = "" if token in self._ends else reader.read(token)
            stopped = token in self._ends or reader.stopped
            finished = "stop" if stopped else "length" if made == job.most else None
            yield Progress(text + (reader.rest() if finished else ""), finished)
            logits = self._forward([token], cache)

    def _forward(self, ids: list[int], cache: Any) -> Tensor:
        """The logits [vocab] of what comes after these tokens, which follow those in the cache."""
        x = torch.tensor([ids], device=self._model.device)
        out: Any = self._model(input_ids=x, use_cache=True, logits_to_keep=1, **{CACHE: cache})
        return out.logits[0, -1]
