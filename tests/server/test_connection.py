"""Connections that keep a server waiting."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("uvicorn")

import uvicorn

from llmquant.server import connection

ASKED = b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n"
SLOW = ASKED[:-2] + b"X-Slow: " + b"y" * 80


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers when all of the body is there."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(connection, "PATIENCE", 0.6)
    bound = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=connection.Connection, lifespan="off", log_level="error", timeout_keep_alive=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    yield bound.getsockname()
    server.should_exit = True
    thread.join()


def seconds_until_closed(peer: socket.socket, drip: bytes = b"") -> float:
    """While a byte of `drip` is sent every tenth of a second."""
    started = time.monotonic()
    peer.settimeout(0.1)
    for at in range(100):
        try:
            if at < len(drip):
                peer.send(drip[at : at + 1])
            if peer.recv(1) == b"":
                return time.monotonic() - started
        except TimeoutError:
            continue
        except ConnectionError:
            return time.monotonic() - started
    pytest.fail("it was not closed within 10 seconds")


def is_answered(peer: socket.socket) -> bool:
    answer = b""
    while not answer.endswith(b"\r\n\r\nok"):
        part = peer.recv(1000)
        if not part:
            return False
        answer += part
    return True


@pytest.mark.parametrize("drip", [b"", ASKED[:9], SLOW], ids=["silent", "begun", "slow"])
def test_headers_that_do_not_come_end_the_connection(address: tuple[str, int], drip: bytes) -> None:
    with socket.create_connection(address) as peer:
        assert 0.5 < seconds_until_closed(peer, drip) < 5


def test_a_later_request_has_as_long(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as peer:
        for _ in range(3):  # each in time, all of them not
            time.sleep(0.3)
            peer.sendall(ASKED)
            assert is_answered(peer)
        assert 0.5 < seconds_until_closed(peer, SLOW) < 5


def test_a_body_may_take_longer(address: tuple[str, int]) -> None:
    """How long is the application's to say."""
    with socket.create_connection(address) as peer:
        peer.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n")
        time.sleep(1.2)
        peer.sendall(b"{}")
        assert is_answered(peer)
