"""The routes, and what an answer looks like: OpenAI's chats and completions, whole or as a stream of events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from transformers import GenerationConfig

from llmquant.server.engine import Engine, Event, Full, Job, Progress
from llmquant.server.guard import answer, read_body
from llmquant.server.metrics import Metrics
from llmquant.server.prompt import Prompts
from llmquant.server.protocol import Asked, Chat, Completion, Refusal, parse
from llmquant.server.sampling import Sampling

LONGEST = 600.0  # seconds of an answer
SILENCE = 15.0  # seconds without an event, before a comment says that the stream is alive


@dataclass(frozen=True)
class Service:
    """What the routes need."""

    name: str  # of the model
    engine: Engine
    prompts: Prompts
    config: GenerationConfig
    metrics: Metrics


class Stream:
    """The tokens of one answer as they come. Leaving the `with` block cancels what is left of it."""

    def __init__(self, service: Service, asked: Chat | Completion, ids: list[int]) -> None:
        """Raises Refusal: there is no room for the answer, or too many requests wait."""
        self._metrics, self.prompt_tokens, self.new_tokens = service.metrics, len(ids), 0
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._began = self._last = time.monotonic()
        self._job = Job(
            ids,
            service.prompts.most(asked, len(ids)),
            Sampling.of(asked, service.config),
            asked.stops,
            lambda event: loop.call_soon_threadsafe(self._events.put_nowait, event),
        )
        try:
            service.engine.submit(self._job)
        except Full as error:
            self._metrics.rejections.labels("queue_full").inc()
            raise Refusal(429, "too many requests wait; try again", code="queue_full", wait=1) from error
        self._metrics.prompt_tokens.inc(len(ids))

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._job.cancelled.set()

    async def next(self, patience: float) -> Progress | None:
        """One more token; None if none came within so many seconds.

        Raises:
            Refusal: it failed, or the answer takes too long.
        """
        left = self._began + LONGEST - time.monotonic()
        try:
            event = await asyncio.wait_for(self._events.get(), min(patience, left))
        except asyncio.TimeoutError as error:
            if left <= patience:
                raise Refusal(504, f"the answer took more than {LONGEST:.0f} seconds", code="timeout") from error
            return None
        if isinstance(event, Exception) and _is_out_of_memory(event):
            raise Refusal(503, "out of memory; try a shorter request, or later", code="out_of_memory", wait=10)
        if isinstance(event, Exception):
            raise Refusal(500, f"the answer failed: {type(event).__name__}")
        self._count(event)
        return event

    @property
    def usage(self) -> dict[str, int]:
        both = self.prompt_tokens + self.new_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.new_tokens, "total_tokens": both}

    def _count(self, event: Progress) -> None:
        now, metrics = time.monotonic(), self._metrics
        (metrics.between_tokens if self.new_tokens else metrics.first_token).observe(now - self._last)
        self._last = now
        self.new_tokens += 1
        metrics.generation_tokens.inc()
        if event.finished:
            metrics.whole.observe(now - self._began)
            metrics.success.labels(event.finished).inc()


def _is_out_of_memory(error: Exception) -> bool:
    """On a CPU torch raises a RuntimeError that only its text tells from others."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class Chats:
    """How chats are written."""

    kind, stream_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    opening = ({"delta": {"role": "assistant", "content": ""}},)

    @staticmethod
    def whole(text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    @staticmethod
    def part(text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


class Completions:
    """How completions are written."""

    kind = stream_kind = "text_completion"
    prefix = "cmpl"
    opening: tuple[dict[str, Any], ...] = ()

    @staticmethod
    def whole(text: str) -> dict[str, Any]:
        return {"text": text}

    part = whole


Style = type[Chats] | type[Completions]


def make_app(service: Service) -> FastAPI:
    """The routes, open to all: `guard.Guard` belongs around them."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        return Response(status_code=200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        own = {"id": service.name, "object": "model", "created": created, "owned_by": "llmquant"}
        return {"object": "list", "data": [own | {"max_model_len": service.prompts.room}]}

    @app.post("/v1/chat/completions")
    async def chats(request: Request) -> Response:
        return await respond(service, request, Chat, Chats)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await respond(service, request, Completion, Completions)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        return answer(refusal)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> Response:
        return answer(Refusal(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        return answer(Refusal(500, "the server failed at this request"))

    return app


async def respond(service: Service, request: Request, kind: type[Asked], style: Style) -> Response:
    """Raises Refusal."""
    asked = parse(kind, await read_body(request))
    if asked.model != service.name:
        told = f"model: there is no {asked.model!r} here; use {service.name!r}"
        raise Refusal(404, told, param="model", code="model_not_found")
    ids = await asyncio.to_thread(service.prompts.ids, asked)
    stream = Stream(service, asked, ids)
    head = {"id": f"{style.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventResponse(stream, _events(stream, style, head | {"object": style.stream_kind}, usage))
    with stream:
        found = await unless_gone(request, lambda: _collect(stream))
    if found is None:
        return Response(status_code=499)  # to nobody
    text, finished = found
    choice = {"index": 0, **style.whole(text), "logprobs": None, "finish_reason": finished}
    return JSONResponse(head | {"object": style.kind, "choices": [choice], "usage": stream.usage})


async def _collect(stream: Stream) -> tuple[str, str]:
    """The whole text, and why it ended."""
    texts = []
    while True:
        if event := await stream.next(LONGEST):
            texts.append(event.text)
            if event.finished:
                return "".join(texts), event.finished


class EventResponse(StreamingResponse):
    """Server-sent events. However it ends, and if nobody is there to see it begin, so does the answer."""

    def __init__(self, stream: Stream, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._stream:
            await super().__call__(scope, receive, send)


async def _events(stream: Stream, style: Style, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Server-sent events: a token each, then perhaps the usage, then the end. An error is the last event, too."""

    def chunk(part: dict[str, Any], finished: str | None = None) -> str:
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finished}
        return _event(head | {"choices": [choice]} | ({"usage": None} if usage else {}))

    try:
        for part in style.opening:
            yield chunk(part)
        finished = None
        while finished is None:
            event = await stream.next(SILENCE)
            if event is None:
                yield ": still here\n\n"
            elif event.text or event.finished:
                yield chunk(style.part(event.text), event.finished)
            finished = event and event.finished
        if usage:
            yield _event(head | {"choices": [], "usage": stream.usage})
        yield "data: [DONE]\n\n"
    except Refusal as refusal:
        yield _event(refusal.to_dict())


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def unless_gone(request: Request, work: Callable[[], Awaitable[tuple[str, str]]]) -> tuple[str, str] | None:
    """What the work gives; None, and the work is cancelled, if who asked hangs up before."""
    working, gone = asyncio.ensure_future(work()), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
