"""Who may come in, and how much may be brought along."""

import asyncio
import hashlib
import hmac
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from llmquant.server.protocol import Refusal

OPEN = "/health"  # to everybody
MOST = 4 << 20  # bytes of a body
PATIENCE = 30  # seconds for all of it

Asgi = Callable[[Any, Any, Any], Awaitable[None]]


class Guard:
    """Asks for one of the keys on every path but `OPEN`; without keys, for none."""

    def __init__(self, app: Asgi, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(os.fsencode(key)) for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != OPEN and not self._admits(dict(scope["headers"])):
            refusal = Refusal(401, "no valid API key; send one as `Authorization: Bearer KEY`", code="invalid_api_key")
            await answer(refusal)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _admits(self, headers: dict[bytes, bytes]) -> bool:
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        # All are compared, each in the same time, so that time says nothing of any.
        same = [hmac.compare_digest(given, digest) for digest in self._digests]
        return not same or (kind.lower() == b"bearer" and any(same))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def answer(refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal.to_dict(), refusal.status, refusal.headers)


async def read_body(request: Request) -> bytes:
    """Raises Refusal: it is too large, too slow, or not all there."""
    try:
        return await asyncio.wait_for(_read(request), PATIENCE)
    except asyncio.TimeoutError as error:
        raise Refusal(408, f"the body did not come within {PATIENCE} seconds") from error
    except ClientDisconnect as error:
        raise Refusal(400, "the body ended before it was whole") from error


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():  # whatever Content-Length promises
        body += part
        if len(body) > MOST:
            raise Refusal(413, f"the body has more than {MOST} bytes")
    return bytes(body)
