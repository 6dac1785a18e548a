"""The administration routes of several vLLM servers (VLLM_SERVER_DEV_MODE=1), called on all of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_r1reward.network.server_api import ServerCallError, call, open_client
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
        self._http = open_client(timeout_s=timeout_s)
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
        try:
            response = call(
                self._http,
                method,
                target.url + path,
                token=target.token,
                body=body,
                params=params,
                timeout_s=timeout_s,
            )
        except ServerCallError as error:
            raise WeightPushError(str(error)) from error
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise WeightPushError(f"{method} {target.url}{path} answered no JSON: {response.text[:100]}") from error


def _outcome(call: Future[Any]) -> Any:
    try:
        return call.result()
    except WeightPushError as error:
        return error
