"""One token of every request at a time, in a thread of its own.

Each request has its own cache. Their next tokens pass the model together where its native steps serve, which give each
the same bits as alone, and otherwise one after the other. So an answer does not depend on what else is asked: with
temperature 0 or a seed it is the same whether the server is busy or not, and what fails fails alone.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llmquant.kernels.attention import FEWEST
from llmquant.native import release_threads
from llmquant.runtime.decode import CACHE, next_logits
from llmquant.server.reader import Reader
from llmquant.server.sampling import Sampler, Sampling

CHUNKS = {"cpu": 256, "cuda": 2048}  # tokens of a prompt that pass the model at once; others wait so long


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


class _Turn:
    """A request that is being computed.

    Attributes:
        cache: what the model has been given of `ids`, `held` tokens.
        ids: the prompt and the answer so far.
    """

    def __init__(self, job: Job, sampler: Sampler, reader: Reader, cache: Any, chunk: int) -> None:
        self.job, self.cache, self._chunk = job, cache, chunk
        self.ids, self.held = list(job.ids), 0
        self._sampler, self._reader = sampler, reader

    @property
    def due(self) -> list[int]:
        """Tokens that the model is to be given next. No part of a prompt is so short that it is attended otherwise."""
        last = len(self.ids) - self.held < self._chunk + FEWEST
        return self.ids[self.held :] if last else self.ids[self.held : self.held + self._chunk]

    @property
    def writes(self) -> bool:
        """Whether that is one token, after others."""
        return 0 < self.held == len(self.ids) - 1

    def take(self, logits: Tensor, ends: frozenset[int]) -> Progress | None:
        """One more token by the logits [vocab] after those that were due; None while there is more of the prompt."""
        self.held += len(self.due)
        if self.held < len(self.ids):
            return None
        token = self._sampler.choose(logits, self.ids)
        self.ids.append(token)
        text = "" if token in ends else self._reader.read(token)
        stopped = token in ends or self._reader.stopped
        full = len(self.ids) == self.job.tokens
        finished = "stop" if stopped else "length" if full else None
        return Progress(text + (self._reader.rest() if finished else ""), finished)


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
        release_threads()  # of whoever has loaded the model
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
                ready = [turn for turn in self.active if turn.writes and not turn.job.cancelled.is_set()]
                logits = self._together(ready)
                self.active = [turn for turn in self.active if self._advance(turn, logits.get(turn))]

    def _admit(self) -> bool:
        """Wait until there is something to do; False if there never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self.active or self.waiting or self._closed)
            while self.waiting and len(self.active) < self._at_once:
                job = self.waiting[0]
                if not job.cancelled.is_set():
                    if self.reserved + job.tokens > self.room:
                        break  # and nobody overtakes it: it would never have its turn
                    self.active.append(self._turn(job))
                self.waiting.popleft()
            return not self._closed

    def _turn(self, job: Job) -> _Turn:
        reader = Reader(self._tokenizer, job.stops)
        cache = DynamicCache(config=self._model.config)
        return _Turn(job, Sampler(job.sampling), reader, cache, CHUNKS[self.device])

    def _together(self, turns: Sequence[_Turn]) -> dict[_Turn, Tensor]:
        """The logits [vocab] after the token of each that is due; none where they cannot be computed together."""
        if turns:
            with suppress(Exception):  # of one of them: each fails by itself
                logits = next_logits(self._model, [*(turn.ids[-1] for turn in turns)], [turn.cache for turn in turns])
                return {} if logits is None else dict(zip(turns, logits, strict=True))
        return {}

    def _advance(self, turn: _Turn, logits: Tensor | None) -> bool:
        """One token, or one more part of the prompt; whether there is more to come."""
        if turn.job.cancelled.is_set():
            return False
        event: Event | None
        try:
            event = turn.take(self._forward(turn) if logits is None else logits, self._ends)
        except Exception as error:  # whatever it is, it is this request's and must not end the others
            event = error.with_traceback(None)  # which would keep the cache
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
        if event is None:
            return True
        with suppress(RuntimeError):  # who asked is gone, and its event loop with it
            turn.job.tell(event)
        return isinstance(event, Progress) and event.finished is None

    def _forward(self, turn: _Turn) -> Tensor:
        """The logits [vocab] after what is due, by transformers."""
        x = torch.tensor([turn.due], device=self._model.device)
        out: Any = self._model(input_ids=x, use_cache=True, logits_to_keep=1, **{CACHE: turn.cache})
        return out.logits[0, -1]
