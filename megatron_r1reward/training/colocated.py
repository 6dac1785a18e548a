"""The trainer's side of sharing its devices with sleeping rollout servers."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_r1reward.config.schema import ClusterSection


def make_room_for_servers(cluster: ClusterSection) -> None:
    """Give cached device memory back before colocated servers wake; collective. Nothing happens in the split layout."""
    if cluster.layout != "colocated":
        return
    torch.cuda.empty_cache()  # does nothing without a GPU
    dist.barrier()  # a server wakes on every rank's device
