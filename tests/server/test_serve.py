"""`llmquant serve` as clients see it: over the wire, from another process."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx
import openai
import psutil
from serving import KEY, Server
from typer.testing import CliRunner

from llmquant.cli import app
from llmquant.errors import CheckpointError, LlmquantError
from llmquant.runtime.generate import generate

HELLO = [{"role": "user", "content": "Hello"}]
LONG = {"max_tokens": 1900, "temperature": 0}  # of a model that sees 2048 tokens


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def ask(server: Server, client: httpx.Client) -> Callable[..., httpx.Response]:
    """A chat, with more in its body."""
    return lambda **more: client.post(
        "/v1/chat/completions", json={"model": server.name, "messages": HELLO, "temperature": 0, "max_tokens": 8} | more
    )


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_openai_s_own_client_gets_what_generate_gives(server: Server, packed: Path) -> None:
    expected = generate(packed, "Hello", max_new_tokens=24)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        assert [model.id for model in client.models.list()] == [server.name]
        told = {"model": server.name, "messages": HELLO, "max_tokens": 24, "temperature": 0}
        whole = client.chat.completions.create(**told)
        assert whole.choices[0].message.content == expected.text
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.prompt_tokens == expected.prompt_tokens
        assert whole.usage.completion_tokens == 24
        stream = list(client.chat.completions.create(**told, stream=True, stream_options={"include_usage": True}))
        assert stream[0].choices[0].delta.role == "assistant"
        assert "".join(part.choices[0].delta.content or "" for part in stream[:-1]) == expected.text
        assert [part.choices[0].finish_reason for part in stream[:-1]] == [*[None] * (len(stream) - 2), "length"]
        assert stream[-1].usage == whole.usage
        text = client.completions.create(model=server.name, prompt="Once upon", temperature=0)
        assert text.usage.completion_tokens == 16
        parts = client.completions.create(model=server.name, prompt="Once upon", temperature=0, stream=True)
        assert "".join(part.choices[0].text for part in parts) == text.choices[0].text


def test_a_seed_repeats(ask: Callable[..., httpx.Response]) -> None:
    said = lambda seed: ask(temperature=1.5, seed=seed, max_tokens=20).json()["choices"][0]["message"]  # noqa: E731
    assert said(1) == said(1) != said(2)


def test_a_stop_string_ends_the_text_before_it(ask: Callable[..., httpx.Response]) -> None:
    text = ask(max_tokens=40).json()["choices"][0]["message"]["content"]
    stop = text[10:14]
    choice = ask(max_tokens=40, stop=[stop]).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_answers_side_by_side_are_those_of_a_quiet_server(ask: Callable[..., httpx.Response]) -> None:
    asked = [{"messages": [{"role": "user", "content": f"Count to {n}"}], "max_tokens": 60} for n in range(6)]
    text = lambda more: ask(**more).json()["choices"][0]["message"]["content"]  # noqa: E731
    alone = [text(more) for more in asked]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(text, asked)) == alone


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/nothing", "/"])
@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY} more"])
def test_without_the_key_nothing_is_told(server: Server, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    refused = httpx.get(server.url + path, headers=headers)
    assert (refused.status_code, error_of(refused)["code"]) == (401, "invalid_api_key")


def test_a_key_in_the_address_is_none(server: Server) -> None:
    assert httpx.get(f"{server.url}/v1/models?api_key={KEY}").status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/redoc", "/v1/embeddings"])
def test_what_is_not_there(client: httpx.Client, path: str) -> None:
    missing = client.get(path)
    assert (missing.status_code, error_of(missing)["message"]) == (404, "Not Found")
    assert client.get("/v1/completions").status_code == 405


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"model": "another"}, 404, "model"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"n": 10**9}, 400, "n"),
        ({"tools": []}, 400, "tools"),
        ({"max_tokens": 5000}, 400, "max_tokens"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages"),
    ],
)
def test_what_cannot_be_answered_says_why(
    ask: Callable[..., httpx.Response], more: dict[str, Any], status: int, param: str
) -> None:
    refused = ask(**more)
    assert (refused.status_code, error_of(refused)["param"]) == (status, param)


def test_a_prompt_s_tokens_are_checked(server: Server, client: httpx.Client) -> None:
    ask = lambda prompt: client.post("/v1/completions", json={"model": server.name, "prompt": prompt})  # noqa: E731
    assert ask([1, 2, 3]).status_code == 200
    assert "no tokens" in error_of(ask([]))["message"]
    assert "token 512, but there are 512" in error_of(ask([5, 512]))["message"]
    assert ask([5, -1]).status_code == 400
    assert "2048 tokens, but" in error_of(ask([5] * 2048))["message"]


def test_a_body_is_never_larger_than_it_may_be(server: Server, client: httpx.Client) -> None:
    memory = psutil.Process(server.process.pid).memory_info
    before = memory().rss
    endless = lambda: (b" " * 65536 for _ in range(1000))  # noqa: E731  (without Content-Length)
    try:
        assert client.post("/v1/completions", content=endless()).status_code == 413
    except httpx.WriteError:
        pass  # it hung up before everything was sent
    assert memory().rss - before < 40e6
    assert client.post("/v1/completions", content=b"{" * 1000).status_code == 400


def raw(server: Server, request: bytes, seconds: float = 10) -> bytes:
    """The beginning of what comes back."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        try:
            connection.sendall(request)
            return connection.recv(4096)
        except (ConnectionError, TimeoutError):
            return b""


def test_hostile_requests_leave_it_healthy(server: Server) -> None:
    headers = b"".join(b"X-%d: %s\r\n" % (i, b"v" * 40) for i in range(10000))
    assert b" 400 " in raw(server, b"GET /health HTTP/1.1\r\n" + headers + b"\r\n").partition(b"\r\n")[0]
    assert b" 400 " in raw(server, b"\x00\x01\x02 nonsense\r\n\r\n").partition(b"\r\n")[0]
    slow = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a key\r\nContent-Length: 100\r\n\r\n{"
    assert raw(server, slow, 0.5) == b""  # and hangs up
    assert httpx.get(f"{server.url}/health").status_code == 200


def settled(server: Server, running: int, waiting: int) -> bool:
    """Whether so many requests run and wait, within some seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if (server.metric("num_requests_running"), server.metric("num_requests_waiting")) == (running, waiting):
            return True
        time.sleep(0.05)
    return False


def test_who_hangs_up_makes_room(server: Server) -> None:
    body = {"model": server.name, "messages": HELLO} | LONG
    assert settled(server, 0, 0)
    before = server.metric("generation_tokens_total")
    for _ in range(6):  # more than are computed at a time
        with server.client() as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=body, timeout=0.1)
        with (
            server.client() as client,
            client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as a,
        ):
            next(a.iter_lines())
    assert settled(server, 0, 0)
    assert server.metric("generation_tokens_total") - before < 12 * LONG["max_tokens"] / 2


def test_health_answers_while_it_computes(server: Server) -> None:
    body = {"model": server.name, "messages": HELLO} | LONG
    with ThreadPoolExecutor(4) as pool, server.client() as client:
        work = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(4)]
        times = []
        while not all(each.done() for each in work):
            began = time.monotonic()
            assert httpx.get(f"{server.url}/health").status_code == 200
            times.append(time.monotonic() - began)
    assert {each.result().status_code for each in work} == {200}
    assert len(times) > 3


def test_metrics_count(server: Server, ask: Callable[..., httpx.Response]) -> None:
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "e2e_request_latency_seconds_count",
    )
    before = [server.metric(name) for name in names]
    usage = ask(max_tokens=5).json()["usage"]
    after = [server.metric(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [usage["prompt_tokens"], 5, 1, 1]


def end(server: Server, signum: int, path: str, **asked: Any) -> None:
    """A signal, and a stream that it finds half done: it comes to its end, and then the server does."""
    body = {"model": server.name, "stream": True, "max_tokens": 400, "temperature": 0} | asked
    with server.client() as client, client.stream("POST", path, json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signum)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.process.wait(timeout=30) == 0
    assert server.process.stderr.read() == ""


def test_a_full_queue_says_come_back_and_a_signal_lets_answers_end(packed: Path, start: Callable[..., Any]) -> None:
    with start(packed, "--max-concurrency", 1, "--max-queue", 1) as server, ThreadPoolExecutor(6) as pool:
        body = {"model": server.name, "messages": HELLO} | LONG
        post = lambda _: httpx.post(  # noqa: E731
            f"{server.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=120
        )
        found = list(pool.map(post, range(6)))
        assert {each.status_code for each in found} == {200, 429}
        late = next(each for each in found if each.status_code == 429)
        assert (late.headers["Retry-After"], error_of(late)["code"]) == ("1", "queue_full")
        assert server.metric("admission_rejections_total") == sum(each.status_code == 429 for each in found)
        end(server, signal.SIGTERM, "/v1/chat/completions", messages=HELLO)


def test_a_port_that_is_taken_is_one_line(packed: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "llmquant.cli", "serve", str(packed), "--port", port]
        busy = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (busy.returncode, busy.stdout, busy.stderr.count("\n")) == (1, "", 1)
    assert "already in use; choose another" in busy.stderr


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (("--host", "0.0.0.0"), 2, "give an --api-key"),  # noqa: S104
        (("--host", "::"), 2, "give an --api-key"),
        (("--host", "example.org"), 2, "give an --api-key"),
        (("--api-key", " "), 2, "--api-key: is empty"),
        (("--max-model-len", "5000"), 1, "the model has 2048 positions"),
        (("--max-model-len", "2000", "--cache-memory", "50KB"), 1, "tokens, not for 2000; raise --cache-memory"),
        (("--cache-memory", "10B"), 1, "caches have memory for 0 tokens, not for 2;"),
        (("--cache-memory", "much"), 2, "--cache-memory much: write a number and a unit"),
        (("--cache-memory", "1GB", "--engine", "vllm"), 2, "give it after --"),
        (("--engine", "vllm"), 1, "pip install vllm"),
        (("--", "--enforce-eager"), 2, "they go with --engine vllm"),
        (("--max-queue", "0"), 2, "--max-queue"),
        (("--port", "65536"), 2, "--port"),
    ],
)
def test_what_it_refuses(
    packed: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], code: int, told: str
) -> None:
    monkeypatch.delenv("LLMQUANT_API_KEY", raising=False)
    refused = CliRunner().invoke(app, ["serve", str(packed), "--port", "0", *options])
    error = refused.exception
    assert (error.exit_code if isinstance(error, LlmquantError) else refused.exit_code) == code
    assert told in " ".join(f"{refused.output} {error}".replace("│", " ").split())


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    for directory, told in ((tmp_path / "none", "is not a directory"), (tmp_path, "config.json")):
        refused = CliRunner().invoke(app, ["serve", str(directory), "--port", "0"])
        assert isinstance(refused.exception, CheckpointError)
        assert told in str(refused.exception)


def test_a_model_without_a_template_serves_completions_only(
    packed: Path, tmp_path: Path, start: Callable[..., Any]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in packed.iterdir():
        (bare / path.name).write_bytes(path.read_bytes())
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    with start(bare, "--served-model-name", "bare one") as server, server.client() as client:
        told = {"model": "bare one", "max_tokens": 3}
        refused = client.post("/v1/chat/completions", json=told | {"messages": HELLO})
        assert refused.status_code == 400
        assert "has no chat template; use /v1/completions" in error_of(refused)["message"]
        assert client.post("/v1/completions", json=told | {"prompt": "Hello"}).status_code == 200
        end(server, signal.SIGINT, "/v1/completions", **{"model": "bare one", "prompt": "Hello"})
