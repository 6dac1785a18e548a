"""Weights from GPU to GPU: trainer and servers on different GPUs, of one machine or of many."""

from __future__ import annotations

from typing import Literal

import torch

from megatron_r1reward.weight_sync.broadcast_sender import GroupTransport


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
