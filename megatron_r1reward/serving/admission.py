"""Who gets in: token, body size, and no more work than can be done soon; the rest hears 429 and when to come again.

request -> ServiceGuard (401) -> BodyLimit (413) -> Admission (429) -> route
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health", "/ready"})  # say nothing about the model or its users
COOKIE = "r1reward_token"


class ServiceGuard:
    """Answers 401 to every request that does not know the token: as `Authorization: Bearer`, or in a cookie that
    `GET /?token=...` sets, for people with a browser."""

    def __init__(self, app: App, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS or self._knows_token(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
            if scope["path"] == "/" and self._equal(given):
                cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
                await answer(send, 303, {}, location="/", set_cookie=cookie)
            else:
                await answer(send, 401, {"error": "a valid bearer token is required"}, www_authenticate="Bearer")
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _equal(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._token.encode())

    def _knows_token(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            text = value.decode("latin-1")
            scheme, _, token = text.partition(" ")
            if name == b"authorization" and scheme.lower() == "bearer" and self._equal(token.strip()):
                return True
            if name == b"cookie" and self._equal(_cookie(text)):
                return True
        return False


def _cookie(header: str) -> str:
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return morsel.value if morsel is not None else ""


class BodyLimit:
    """Answers 413 to a body that is larger than `limit` bytes, whatever its header says about it."""

    def __init__(self, app: App, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        too_large = {"error": f"the body is larger than {self._limit} bytes: send fewer or smaller images"}
        if not declared.isdigit() or int(declared) > self._limit:
            await answer(send, 413, too_large)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise HTTPException(413, too_large["error"])  # inside the application, which answers with it
            return message

        await self._app(scope, counted, send)


class FullError(Exception):
    """No room for one more request."""


class Admission:
    """Counts requests in progress; above `limit` the next one is turned away. Closed while the service drains."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_progress = 0
        self.draining = False

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Raises FullError when there is no room."""
        if self.draining or self.in_progress >= self.limit:
            raise FullError
        self.in_progress += 1
        try:
            yield
        finally:
            self.in_progress -= 1


async def answer(send: Send, status: int, tree: dict[str, Any], **headers: str) -> None:
    """A JSON response outside of the application's own routes."""
    body = json.dumps(tree).encode()
    fields = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    fields += [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})
