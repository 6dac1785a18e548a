"""A real vLLM server behind a proxy that can fail in its place."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from waiting import wait_until

from megatron_r1reward.servers.process import VllmServer

Fault = Callable[[Request], Awaitable[Response | None]]  # None: ask the server


async def no_fault(request: Request) -> Response | None:
    return None


async def internal_error(request: Request) -> Response | None:
    return Response('{"error": {"message": "injected"}}', status_code=500)


async def garbage(request: Request) -> Response | None:
    return Response("<html>gateway</html>", media_type="text/html")


class FaultProxy:
    """Forwards requests to the address that `target` gives, unless `fault` answers them."""

    def __init__(self, target: Callable[[], str]) -> None:
        self.fault: Fault = no_fault
        self._target = target
        # Without idle connections: the server closes them after 5 s, and a request might meet that.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.AsyncClient(timeout=None, trust_env=False, limits=limits)
        app = Starlette(routes=[Route("/{path:path}", self._serve, methods=["GET", "POST"])])
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started or not self._thread.is_alive())
        assert self._thread.is_alive()

    @property
    def url(self) -> str:
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _serve(self, request: Request) -> Response:
        failed = await self.fault(request)
        if failed is not None:
            return failed
        url = f"{self._target()}{request.url.path}"
        headers = {name: request.headers[name] for name in ("authorization", "content-type") if name in request.headers}
        try:
            answer = await self._http.request(
                request.method, url, params=request.query_params, content=await request.body(), headers=headers
            )
        except httpx.TransportError as error:
            return Response(f"no server: {error!r}", status_code=502)
        return Response(answer.content, status_code=answer.status_code, media_type=answer.headers.get("content-type"))


class ProxiedServer(VllmServer):
    """A server that everybody reaches through its proxy."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.proxy = FaultProxy(lambda: VllmServer.url.fget(self))  # type: ignore[attr-defined]

    @property
    def url(self) -> str:
        return self.proxy.url

    def close(self) -> None:
        super().close()
        self.proxy.close()
