"""ASGI middleware that lets nobody in without the bearer token."""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_r1reward.network.tokens import TOKEN_VARIABLE

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/health"})  # says only whether the server is alive


class BearerGuard:
    """Answers 401 to every request without `Authorization: Bearer <token>`, whatever the route, except /health.

    vLLM's own --api-key covers /v1, /v2, /inference and /cohere only; the developer routes (/pause, /update_weights,
    /collective_rpc, ...) would stay open.

    Args:
        token: None takes it from the environment variable `TOKEN_VARIABLE` (vLLM builds middleware without arguments).

    Raises:
        RuntimeError: there is no token.
    """

    def __init__(self, app: App, token: str | None = None) -> None:
        token = token or os.environ.get(TOKEN_VARIABLE)
        if not token:
            raise RuntimeError(f"no bearer token: set {TOKEN_VARIABLE} for this server")
        self._app = app
        self._expected = f"bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN_PATHS or self._knows_token(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            body = b'{"error": {"message": "a valid bearer token is required"}}'
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows_token(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        return hmac.compare_digest(scheme.lower() + b" " + token.strip(), self._expected)
