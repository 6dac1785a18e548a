"""The trainer's end of the weight transports.

Broadcast, which differs in backend and device only: gloo (TCP, any machine, buckets in host memory) and NCCL (trainer
and servers on different GPUs, of one machine or of many).

    buckets.Recording -> BroadcastGroup, in a thread  ~~>  broadcast_group.Inlet -> vllm_worker.GroupReceiver

Shared memory, for servers on the trainer's machine: CUDA IPC on a GPU, a memory file on a CPU.

    buckets.Recording -> IpcTransport  ~~>  shared_memory -> vllm_worker
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
from megatron_r1reward.weight_sync.shared_memory import MemoryFile, SharedBuffer, export_cuda


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


class IpcTransport(Transport):
    """Fills a buffer that the workers see, and tells them bucket by bucket over HTTP to read it.

    On a CPU the buffer is the snapshot itself: nothing is copied on the way, and the next bucket is filled while the
    servers load this one. On a GPU it is a staging buffer of one bucket, which the workers must be done with first.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU
        self.needs_memory_file = self.device == _CPU
        self._staging: torch.Tensor | None = None
        self._memory: MemoryFile | None = None  # what the workers have open

    def connect(self, control: ControlPlane, source: BucketSource) -> None:
        if self.device == _CPU:
            assert source.memory is not None
            self._memory = source.memory
            shared = SharedBuffer(num_bytes=source.memory.tensor.numel(), path=source.memory.path)
        else:
            self._staging = torch.empty(self._largest(source), dtype=torch.uint8, device=self.device)
            shared = export_cuda(self._staging)
        control.post("/init_weight_transfer_engine", {"init_info": asdict(shared)})

    def send(self, control: ControlPlane, update: WeightUpdate, source: BucketSource) -> None:
        moved = self._memory is not None and source.memory is not self._memory  # its path may be the same
        if moved or (self._staging is not None and self._largest(source) > self._staging.numel()):
            self.connect(control, source)  # other tensors than last time
        loading: list[Future[Any]] = []
        sent = 0  # tensors
        total = len(update.tensors)
        for bucket, flat in source:
            for call in loading:
                call.result()
            if self._staging is not None:
                self._staging[: bucket.num_bytes].copy_(flat)
                torch.cuda.synchronize(self.device)
            sums = source.sums()[sent : sent + len(bucket.metas)].tolist()
            sent += len(bucket.metas)
            message = UpdateMessage(
                update=asdict(WeightUpdate.of(bucket.metas, bucket.num_bytes)),
                offset=bucket.start if self._staging is None else 0,
                checksums=sums,
                last=sent == total,
            )
            body = {"update_info": asdict(message)}
            loading = list(control.start("/update_weights", dict.fromkeys(control.targets, body)).values())
        for call in loading:
            call.result()

    @staticmethod
    def _largest(source: BucketSource) -> int:
        assert source.update is not None
        return max(bucket.num_bytes for bucket in source.update.buckets())

    def disconnect(self) -> None:
        self._staging = self._memory = None


_CPU = torch.device("cpu")
