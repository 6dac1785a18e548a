"""Weights over TCP: works on any machine, for servers without GPUs and as a fallback."""

from __future__ import annotations

from typing import Literal

import torch

from megatron_r1reward.weight_sync.broadcast_sender import GroupTransport


class GlooTransport(GroupTransport):
    """gloo: buckets are taken from host memory."""

    backend: Literal["gloo", "nccl"] = "gloo"
    device = torch.device("cpu")
