"""The trainer's end of the broadcast transports, which differ in backend and device only: gloo (TCP, any machine,
buckets in host memory) and NCCL (trainer and servers on different GPUs, of one machine or of many).

    buckets.Recording -> BroadcastGroup, in a thread  ~~>  broadcast_group.Inlet -> vllm_worker.GroupReceiver
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any, Literal

import torch

from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.admin_api import ControlPlane
from megatron_r1reward.weight_sync.broadcast_group import (
    SENDER_RANK,
    BroadcastGroup,
    Rendezvous,
    filled,
    listen,
    open_sender,
)
from megatron_r1reward.weight_sync.buckets import BucketSource, UpdateMessage, WeightUpdate
from megatron_r1reward.weight_sync.protocol import Transport, wait_for


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
        joining = list(control.start("/init_weight_transfer_engine", bodies).values())
        self._group = wait_for(_in_thread(open_sender, store, meeting), joining)
        for call in joining:
            call.result()

    def send(self, control: ControlPlane, update: WeightUpdate, source: BucketSource) -> None:
        body = {"update_info": asdict(UpdateMessage(update=asdict(update), last=True))}
        receiving = list(control.start("/update_weights", dict.fromkeys(control.targets, body)).values())
        under_way: Future[Any] | None = None
        for _, flat in source:  # the next bucket is filled while this one travels
            if under_way is not None:
                wait_for(under_way, receiving)
            under_way = self._broadcast(flat.to(self.device))  # a snapshot lies on the host
        if under_way is not None:
            wait_for(under_way, receiving)
        wait_for(self._broadcast(source.sums().to(self.device)), receiving)
        for call in receiving:
            call.result()

    def _broadcast(self, tensor: torch.Tensor) -> Future[None]:
        assert self._group is not None, "connect comes first"
        return _in_thread(_guarded, self._group, tensor, filled(tensor))

    def disconnect(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None


class GlooTransport(GroupTransport):
    """gloo: works on any machine, for servers without GPUs and as a fallback."""

    backend: Literal["gloo", "nccl"] = "gloo"
    device = torch.device("cpu")


class NcclTransport(GroupTransport):
    """NCCL: buckets are packed on the trainer's GPU and received on the workers' GPUs.

    Raises:
        ValueError: this process sees no GPU.
    """

    backend: Literal["gloo", "nccl"] = "nccl"

    def __init__(self, *, host: str = "127.0.0.1", timeout_s: float = 600.0) -> None:
        if not torch.cuda.is_available():
            raise ValueError("rollout.weight_transport is 'nccl', but the trainer sees no GPU: use 'gloo' or 'auto'")
        super().__init__(host=host, timeout_s=timeout_s)
        self.device = torch.device("cuda", torch.cuda.current_device())


def _in_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Broadcasts, and meetings, block until the peers answer: in a thread of its own, so that a refusing server
    interrupts the wait, and which the end of this process does not wait for."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return future


def _guarded(group: BroadcastGroup, tensor: torch.Tensor, ready: Any) -> None:
    try:
        group.broadcast(tensor, ready)
    except RuntimeError as error:  # what torch raises for lost connections and time-outs
        raise WeightPushError(f"the broadcast broke off: {error}") from error
