"""Pushing the trainer's weights into running vLLM servers: the steps that are the same for every transport."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import torch

from megatron_r1reward.types import TensorMeta

DEFAULT_BUCKET_BYTES = 64 << 20


class WeightPushError(RuntimeError):
    """A push did not complete. The servers stay paused: what they hold may be a mixture of old and new weights."""


def bucketize(metas: Iterable[TensorMeta], limit_bytes: int = DEFAULT_BUCKET_BYTES) -> Iterator[tuple[TensorMeta, ...]]:
    """Cut `metas`, in order, into runs of one dtype that hold at most `limit_bytes`.

    Both ends call this on the same list and so agree on the messages. A tensor above the limit travels alone.
    """
    bucket: list[TensorMeta] = []
    size = 0
    for meta in metas:
        if bucket and (size + meta.num_bytes > limit_bytes or meta.dtype != bucket[0].dtype):
            yield tuple(bucket)
            bucket, size = [], 0
        bucket.append(meta)
        size += meta.num_bytes
    if bucket:
        yield tuple(bucket)


class ControlPlane:
    """The administration routes of several vLLM servers (VLLM_SERVER_DEV_MODE=1), called on all of them at once."""

    def __init__(self, urls: Sequence[str], *, timeout_s: float) -> None:
        self.urls = tuple(url.rstrip("/") for url in urls)
        self._http = httpx.Client(timeout=timeout_s, trust_env=False)
        self._threads = ThreadPoolExecutor(max_workers=len(self.urls), thread_name_prefix="weight-push")

    def _call(self, method: str, url: str, params: Mapping[str, Any] | None, body: Any) -> Any:
        try:
            response = self._http.request(method, url, params=params, json=body)
        except httpx.HTTPError as error:
            raise WeightPushError(f"{method} {url} failed: {error or type(error).__name__}") from error
        if response.is_error:
            raise WeightPushError(f"{method} {url} answered {response.status_code}: {response.text[:500]}")
        return response.json() if response.content else None

    def start(self, path: str, bodies: Sequence[Any]) -> list[Future[Any]]:
        """Begin one POST per server, with `bodies[i]` for server i, and return at once."""
        pairs = zip(self.urls, bodies, strict=True)
        return [self._threads.submit(self._call, "POST", url + path, None, body) for url, body in pairs]

    def post(self, path: str, *, params: Mapping[str, Any] | None = None, body: Any = None) -> list[Any]:
        """POST to every server and wait for all; raises WeightPushError if one refuses."""
        calls = [self._threads.submit(self._call, "POST", url + path, params, body) for url in self.urls]
        return [call.result() for call in calls]

    def get(self, path: str) -> list[Any]:
        """GET from every server and wait for all; raises WeightPushError if one refuses."""
        calls = [self._threads.submit(self._call, "GET", url + path, None, None) for url in self.urls]
        return [call.result() for call in calls]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()


class WeightPusher(ABC):
    """Replaces the weights of every server, atomically as seen by a request's tokens.

    One push is: pause (requests in flight are kept, prefix, encoder and image caches are cleared) -> start -> tensors
    in buckets -> finish -> check the version -> resume. A request that was in flight continues with the new weights on
    a recomputed KV cache; its weight spans tell where the switch was.

    If anything fails, `push` raises WeightPushError and the servers stay paused; they must be restarted, because a
    half-loaded model serves garbage without complaint. Further pushes are refused.
    """

    def __init__(self, urls: Sequence[str], *, timeout_s: float = 600.0) -> None:
        self.servers = ControlPlane(urls, timeout_s=timeout_s)
        self._connected = False
        self.broken: str | None = None  # why the servers hold unknown weights and are paused

    def push(self, metas: Sequence[TensorMeta], tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Send all tensors and make `version` current on every server.

        Args:
            metas: every tensor that will come, in the order in which it will come.
            tensors: (name, tensor) in that order; consumed bucket by bucket, so it may be a generator that gathers
                each tensor when asked. Names and shapes are the checkpoint's. The tensors of one fused layer (q, k
                and v; gate and up) must all be there; whole modules may be left out and then keep their weights.
            version: reported by the servers in every response from now on.

        Raises:
            WeightPushError: the push failed; the servers stay paused.
        """
        if self.broken is not None:
            raise WeightPushError(f"an earlier push failed ({self.broken}): restart the servers before pushing again")
        self.broken = "interrupted"
        try:
            if not self._connected:
                self._connect()
                self._connected = True
            self.servers.post("/pause", params={"mode": "keep", "clear_cache": True})
            self.servers.post("/start_weight_update")
            self._transfer(metas, tensors)
            self.servers.post("/finish_weight_update", body={"weight_version": str(version)})
            self._check_version(version)
            self.servers.post("/resume")
        except Exception as error:
            self.broken = f"{type(error).__name__}: {error}"
            self._disconnect()
            raise WeightPushError(
                f"pushing weight version {version} failed, the servers stay paused: {self.broken}"
            ) from error
        self.broken = None

    def close(self) -> None:
        """Release the transport; the servers keep serving what they have."""
        self._disconnect()
        self.servers.close()

    def _check_version(self, version: int) -> None:
        for url, info in zip(self.servers.urls, self.servers.get("/weight_info"), strict=True):
            if info["weight_version"] != str(version):
                raise WeightPushError(
                    f"{url} reports weight version {info['weight_version']!r} after pushing {version}"
                )

    @abstractmethod
    def _connect(self) -> None:
        """Open the transport to every worker of every server."""

    @abstractmethod
    def _transfer(self, metas: Sequence[TensorMeta], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Deliver the tensors to every worker; returns when all have loaded them."""

    @abstractmethod
    def _disconnect(self) -> None:
        """Close the transport, at any time; workers that wait for data must notice soon."""
