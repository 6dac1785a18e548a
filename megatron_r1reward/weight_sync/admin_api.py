"""The administration routes of several vLLM servers (VLLM_SERVER_DEV_MODE=1), called on all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from megatron_r1reward.network.tokens import bearer
from megatron_r1reward.weight_sync import WeightPushError


@dataclass(frozen=True, kw_only=True)
class Target:
    """One life of one server: after a restart it is another target."""

    name: str
    url: str
    token: str | None = None
    incarnation: int = 0


class ControlPlane:
    """Calls to a fixed set of servers, in parallel. Every answer is a value or a WeightPushError, per server."""

    def __init__(self, targets: Sequence[Target], *, timeout_s: float) -> None:
        self.targets = tuple(targets)
        # A connection for each call: a server closes it after answering 500, and the next call on it would fail.
        self._http = httpx.Client(timeout=timeout_s, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
        self._threads = ThreadPoolExecutor(max_workers=max(len(self.targets), 1), thread_name_prefix="weight-push")

    def start(
        self,
        path: str,
        bodies: Mapping[Target, Any] | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        method: str = "POST",
        targets: Sequence[Target] | None = None,
        timeout_s: float | None = None,
    ) -> dict[Target, Future[Any]]:
        """Begin one call per server and return at once. A future raises WeightPushError when its server refuses."""
        return {
            target: self._threads.submit(
                self._call, method, target, path, params, None if bodies is None else bodies[target], timeout_s
            )
            for target in (self.targets if targets is None else targets)
        }

    def call(self, path: str, bodies: Mapping[Target, Any] | None = None, **options: Any) -> dict[Target, Any]:
        """`start` and wait for all; a WeightPushError is the value of a server that refused."""
        return {target: _outcome(call) for target, call in self.start(path, bodies, **options).items()}

    def post(self, path: str, body: Any = None) -> dict[Target, Any]:
        """POST the same to all and wait; raises the first server's WeightPushError if one refuses."""
        calls = self.start(path, dict.fromkeys(self.targets, body))
        return {target: call.result() for target, call in calls.items()}

    def get(self, path: str) -> dict[Target, Any]:
        """GET from all and wait; raises the first server's WeightPushError if one refuses."""
        return {target: call.result() for target, call in self.start(path, method="GET").items()}

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _call(
        self,
        method: str,
        target: Target,
        path: str,
        params: Mapping[str, Any] | None,
        body: Any,
        timeout_s: float | None,
    ) -> Any:
        url = target.url + path
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else timeout_s
        try:
            response = self._http.request(
                method, url, params=params, json=body, headers=bearer(target.token), timeout=timeout
            )
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: the client was closed meanwhile
            raise WeightPushError(f"{method} {url} failed: {error or type(error).__name__}") from error
        if response.is_error:
            raise WeightPushError(f"{method} {url} answered {response.status_code}: {response.text[:500]}")
        return response.json() if response.content else None


def _outcome(call: Future[Any]) -> Any:
    try:
        return call.result()
    except WeightPushError as error:
        return error
