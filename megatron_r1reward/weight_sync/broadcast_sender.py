"""The trainer's end of the broadcast transports, which differ in backend and device only."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any, Literal

import torch

from megatron_r1reward.weight_sync.admin_api import ControlPlane
from megatron_r1reward.weight_sync.broadcast_group import SENDER_RANK, BroadcastGroup, Rendezvous, listen
from megatron_r1reward.weight_sync.buckets import UpdateMessage, WeightUpdate
from megatron_r1reward.weight_sync.once_per_host import open_sender
from megatron_r1reward.weight_sync.snapshot import BucketSource
from megatron_r1reward.weight_sync.transport import Transport, wait_for
from megatron_r1reward.weight_sync.weights import WeightPushError


class GroupTransport(Transport):
    """Broadcasts every bucket, then the checksums, to all workers of all servers at once.

    Args:
        host: the address under which the servers reach this process.
        timeout_s: of the rendezvous and of one broadcast.
        once_per_host: workers on one machine without GPUs share what one of them receives.
    """

    backend: Literal["gloo", "nccl"]

    def __init__(self, *, host: str = "127.0.0.1", timeout_s: float = 600.0, once_per_host: bool = True) -> None:
        self._host = host
        self._timeout_s = timeout_s
        self._once_per_host = once_per_host
        self._group: BroadcastGroup | None = None
        # Broadcasts block until the peers answer; in a thread of their own a refusing server interrupts the wait.
        self._thread: ThreadPoolExecutor | None = None

    def connect(self, control: ControlPlane, source: BucketSource) -> None:
        workers = [int(reply["world_size"]) for reply in control.get("/get_world_size").values()]
        store = listen(self._host, self._timeout_s)
        meeting = Rendezvous(
            backend=self.backend,
            host=self._host,
            port=store.port,
            rank_offset=SENDER_RANK,
            world_size=1 + sum(workers),
            timeout_s=self._timeout_s,
            once_per_host=self._once_per_host,
        )
        offsets = accumulate(workers[:-1], initial=1)
        bodies = {
            target: {"init_info": asdict(replace(meeting, rank_offset=offset))}
            for target, offset in zip(control.targets, offsets, strict=True)
        }
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=self.backend)
        joining = list(control.start("/init_weight_transfer_engine", bodies).values())
        self._group = wait_for(self._thread.submit(open_sender, store, meeting), joining)
        for call in joining:
            call.result()

    def send(self, control: ControlPlane, update: WeightUpdate, source: BucketSource) -> None:
        body = {"update_info": asdict(UpdateMessage(update=asdict(update), last=True))}
        receiving = list(control.start("/update_weights", dict.fromkeys(control.targets, body)).values())
        under_way: Future[Any] | None = None
        for _, flat in source:  # the next bucket is filled while this one travels
            if under_way is not None:
                wait_for(under_way, receiving)
            under_way = self._broadcast(flat)
        if under_way is not None:
            wait_for(under_way, receiving)
        wait_for(self._broadcast(source.sums().to(self.device)), receiving)
        for call in receiving:
            call.result()

    def _broadcast(self, tensor: torch.Tensor) -> Future[Any]:
        assert self._group is not None and self._thread is not None, "connect comes first"
        return self._thread.submit(_guarded, self._group, tensor)

    def disconnect(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._thread = None


def _guarded(group: BroadcastGroup, tensor: torch.Tensor) -> None:
    try:
        group.broadcast(tensor)
    except RuntimeError as error:  # what torch raises for lost connections and time-outs
        raise WeightPushError(f"the broadcast broke off: {error}") from error
