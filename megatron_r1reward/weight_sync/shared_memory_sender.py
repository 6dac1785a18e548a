"""Weights through shared memory, for servers on the trainer's machine: CUDA IPC on a GPU, a memory file on a CPU."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import torch

from megatron_r1reward.weight_sync.admin_api import ControlPlane
from megatron_r1reward.weight_sync.buckets import BucketSource, UpdateMessage, WeightUpdate
from megatron_r1reward.weight_sync.protocol import Transport
from megatron_r1reward.weight_sync.shared_memory import MemoryFile, SharedBuffer, export_cuda


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
