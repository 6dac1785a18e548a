"""The trainer's end of the gloo transport: one broadcast group with every worker of every server."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any

import torch

from megatron_r1reward.rollout.gloo_wire import SENDER_RANK, GlooGroup, GlooRendezvous, GlooUpdate, listen
from megatron_r1reward.rollout.weights import DEFAULT_BUCKET_BYTES, WeightPusher, WeightPushError
from megatron_r1reward.types import TensorMeta


class GlooWeightPusher(WeightPusher):
    """Sends weights over TCP. Works on any machine; meant for servers without GPUs.

    Args:
        urls: the servers; each may have several workers (tensor parallel), which are counted over HTTP.
        host: the address under which the servers reach this process.
        timeout_s: of the rendezvous, of one broadcast and of one HTTP call.
        bucket_bytes: size of one broadcast; also the extra memory on both ends.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        host: str = "127.0.0.1",
        timeout_s: float = 600.0,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        super().__init__(urls, timeout_s=timeout_s)
        self._host = host
        self._timeout_s = timeout_s
        self._bucket_bytes = bucket_bytes
        self._group: GlooGroup | None = None
        # gloo calls block until the peers answer; in a thread of their own a refusing server interrupts the wait.
        self._gloo = ThreadPoolExecutor(max_workers=1, thread_name_prefix="gloo")

    def _connect(self) -> None:
        workers = [int(reply["world_size"]) for reply in self.servers.get("/get_world_size")]
        store = listen(self._host, self._timeout_s)
        meeting = GlooRendezvous(
            host=self._host,
            port=store.port,
            rank_offset=SENDER_RANK,
            world_size=1 + sum(workers),
            timeout_s=self._timeout_s,
        )
        offsets = accumulate(workers[:-1], initial=1)
        bodies = [{"init_info": asdict(replace(meeting, rank_offset=offset))} for offset in offsets]
        joining = self.servers.start("/init_weight_transfer_engine", bodies)
        self._group = _wait_for(self._gloo.submit(GlooGroup, store, meeting, SENDER_RANK), joining)
        for call in joining:
            call.result()

    def _transfer(self, metas: Sequence[TensorMeta], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        assert self._group is not None
        update = GlooUpdate.of(metas, self._bucket_bytes)
        receiving = self.servers.start("/update_weights", [{"update_info": asdict(update)}] * len(self.servers.urls))
        for flat in _pack(update, tensors):
            _wait_for(self._gloo.submit(self._group.broadcast, flat), receiving)
        for call in receiving:
            call.result()

    def _disconnect(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
        self._connected = False

    def close(self) -> None:
        super().close()
        self._gloo.shutdown(wait=False)


def _wait_for(ours: Future[Any], theirs: Sequence[Future[Any]]) -> Any:
    """The result of our end of an exchange; raises at once when one of the servers' ends fails."""
    pending: set[Future[Any]] = {ours, *theirs}
    while not ours.done():
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for call in done:
            call.result()
    return ours.result()


def _pack(update: GlooUpdate, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[torch.Tensor]:
    """Copy the tensors of each bucket back to back into one flat CPU tensor."""
    stream = iter(tensors)
    for bucket in update.buckets():
        flat = torch.empty(sum(meta.numel for meta in bucket), dtype=bucket[0].torch_dtype)
        offset = 0
        for meta in bucket:
            name, tensor = next(stream, (None, None))
            if name is None or tensor is None:
                raise WeightPushError(f"the tensors end before {meta.name}, which the metadata announces")
            if TensorMeta.of(name, tensor) != meta:
                raise WeightPushError(f"announced {meta}, got {TensorMeta.of(name, tensor)}: same order, same shapes")
            flat[offset : offset + meta.numel].copy_(tensor.detach().reshape(-1))
            offset += meta.numel
        yield flat
    if (extra := next(stream, None)) is not None:
        raise WeightPushError(f"tensor {extra[0]} comes after the last one that the metadata announces")
