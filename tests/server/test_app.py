"""What takes long, or goes wrong inside: the routes in this process, where it can be made to."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import torch
from fastapi.testclient import TestClient

from llmquant.server import app as routes
from llmquant.server import guard
from llmquant.server.app import Service, make_app
from llmquant.server.commands import make_service
from llmquant.server.protocol import Completion, Refusal

ASKED = {"model": "tiny", "prompt": "Once", "temperature": 0, "max_tokens": 5}


@pytest.fixture(scope="module")
def service(packed: Path) -> Iterator[Service]:
    made = make_service(packed, "tiny", room=None, cache=None, at_once=2, queue=2, precision="exact", device="cpu")
    yield made
    made.engine.close()


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service)) as client:
        yield client


@pytest.fixture
def failing(service: Service) -> Iterator[list[Exception]]:
    """What is put in here the model raises, once each."""
    faults: list[Exception] = []

    def fail(*_: Any) -> None:
        if faults:
            raise faults.pop()

    handle = service.engine._model.get_output_embeddings().register_forward_pre_hook(fail)
    yield faults
    handle.remove()


def out_of_memory() -> Exception:
    """Torch's own, on a CPU."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (torch.OutOfMemoryError("no room"), 503, "out_of_memory"),
        (out_of_memory(), 503, "out_of_memory"),
        (ValueError("a secret path"), 500, None),
    ],
    ids=["gpu", "cpu", "other"],
)
def test_a_fault_is_told_and_forgotten(
    client: TestClient, failing: list[Exception], fault: Exception, status: int, code: str | None
) -> None:
    good = client.post("/v1/completions", json=ASKED).json()["choices"]
    failing.append(fault)
    failed = client.post("/v1/completions", json=ASKED)
    error = failed.json()["error"]
    assert (failed.status_code, error["code"], error["type"]) == (status, code, "server_error")
    assert "secret" not in failed.text
    failing.append(fault)
    events = client.post("/v1/completions", json=ASKED | {"stream": True}).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == code
    assert client.post("/v1/completions", json=ASKED).json()["choices"] == good


def test_logits_that_are_not_finite_are_a_fault(client: TestClient, service: Service) -> None:
    spoil = lambda *_: torch.full((1, 1, 512), torch.nan)  # noqa: E731
    handle = service.engine._model.get_output_embeddings().register_forward_hook(spoil)
    failed = client.post("/v1/completions", json=ASKED)
    handle.remove()
    assert (failed.status_code, failed.json()["error"]["message"]) == (500, "the answer failed: NumericsError")
    assert client.post("/v1/completions", json=ASKED).status_code == 200


def test_an_answer_that_takes_too_long(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "LONGEST", 0.05)
    late = client.post("/v1/completions", json=ASKED | {"max_tokens": 2000})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    events = client.post("/v1/completions", json=ASKED | {"max_tokens": 2000, "stream": True}).text
    assert '"code": "timeout"' in events
    assert "[DONE]" not in events


def test_a_stream_without_news_says_that_it_is_alive(
    client: TestClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "SILENCE", 0.001)
    slow = service.engine._model.get_output_embeddings().register_forward_pre_hook(lambda *_: time.sleep(0.05))
    events = client.post("/v1/completions", json=ASKED | {"stream": True}).text
    slow.remove()
    assert events.count(": still here\n\n") > 1
    assert events.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("key", ["plain", "schlüssel", "鍵"])
def test_a_key_of_any_characters(service: Service, key: str) -> None:
    with TestClient(guard.Guard(make_app(service), ["another", key])) as client:
        for given, status in ((key, 200), (f"{key}x", 401), ("", 401)):
            asked = client.get("/v1/models", headers={"Authorization": b"Bearer " + given.encode()})
            assert asked.status_code == status


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        async def stream(self) -> Any:
            yield b"{"
            await asyncio.sleep(60)

    monkeypatch.setattr(guard, "PATIENCE", 0.05)
    with pytest.raises(Refusal) as refused:
        asyncio.run(guard.read_body(Slow()))
    assert refused.value.status == 408


def test_who_is_gone_before_an_answer_begins(service: Service) -> None:
    """The events are never asked for, so nothing inside of them could cancel."""
    asked = Completion(model="tiny", prompt="Once", max_tokens=2000, stream=True)

    async def run() -> routes.Stream:
        async def gone() -> dict[str, str]:
            return {"type": "http.disconnect"}

        async def send(_: object) -> None:
            await asyncio.sleep(60)

        stream = routes.Stream(service, asked, [5, 6])
        response = routes.EventResponse(stream, routes._events(stream, routes.Completions, {}, usage=False))
        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, gone, send)
        return stream

    assert asyncio.run(run())._job.cancelled.is_set()
