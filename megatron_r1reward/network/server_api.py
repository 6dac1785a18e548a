"""Health and administration of a server over HTTP: whatever is asked of one besides answers to prompts.

One rule for all who ask (the supervisor, a server's starter, its group, weight pushes, the doctor): no proxy, the
bearer token in the header, and an error that names the call, the server and what it said. httpx is imported where it is
needed: the supervisor asks for health alone.
"""

from __future__ import annotations

import asyncio
import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from megatron_r1reward.network.tokens import bearer

if TYPE_CHECKING:
    import httpx

HEALTH = "/health"
_TIMEOUT_S = 5.0
_ATTEMPTS = 6
_PAUSE_S = 2.0
_SAID = 500  # characters of a refusal


class ServerCallError(RuntimeError):
    """A server did not answer, or refused."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """Somebody else is there: none of the other calls would follow."""


def unhealthy(url: str, *, attempts: int = _ATTEMPTS) -> str | None:
    """None when the server at `url` answers /health; else what happened instead, at the last of several attempts."""
    # Cluster nodes are not behind the proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    problem = "not asked"
    for attempt in range(attempts):
        if attempt:
            time.sleep(_PAUSE_S)
        try:
            with opener.open(url + HEALTH, timeout=_TIMEOUT_S) as answer:
                answer.read()
                return None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            problem = str(error) or type(error).__name__
    return problem


@cache
def tls() -> ssl.SSLContext:
    """The machine's certificates, for every client of this process: reading them takes longer than ten requests."""
    return ssl.create_default_context()


def open_client(*, timeout_s: float) -> httpx.Client:
    """For `call`. A connection for each call: a server closes it after answering 500, and the next on it would fail."""
    import httpx

    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(timeout=timeout_s, trust_env=False, limits=limits, verify=tls())


def open_async_client() -> httpx.AsyncClient:
    """For `call_async`."""
    import httpx

    return httpx.AsyncClient(trust_env=False, timeout=None, verify=tls())


def call(
    client: httpx.Client,
    method: str,
    url: str,
    *,
    token: str | None,
    body: Any = None,
    params: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
) -> httpx.Response:
    """The answer to one call; `timeout_s` None: the client's.

    Raises:
        ServerCallError: no answer, or not 2xx.
    """
    import httpx

    timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
    try:
        response = client.request(method, url, params=params, json=body, headers=bearer(token), timeout=timeout)
    except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
        raise _unanswered(method, url, error) from error
    return _checked(method, url, response)


async def call_async(
    client: httpx.AsyncClient, method: str, url: str, *, token: str | None, body: Any = None, timeout_s: float
) -> httpx.Response:
    """As `call`; `timeout_s` is for the call as a whole."""
    import httpx

    try:
        async with asyncio.timeout(timeout_s):
            response = await client.request(method, url, json=body, headers=bearer(token))
    except TimeoutError as error:
        raise ServerCallError(f"{method} {url}: no answer within {timeout_s:g} s") from error
    except httpx.HTTPError as error:
        raise _unanswered(method, url, error) from error
    return _checked(method, url, response)


def _unanswered(method: str, url: str, error: Exception) -> ServerCallError:
    return ServerCallError(f"{method} {url} failed: {type(error).__name__} {error}".rstrip())


def _checked(method: str, url: str, response: httpx.Response) -> httpx.Response:
    if not response.is_success:
        raise ServerCallError(f"{method} {url} answered {response.status_code}: {response.text[:_SAID]}")
    return response
