"""What a server step must know of the machine, without the seconds that torch takes to import where there is no GPU."""

from __future__ import annotations

import ctypes
import sys

from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.servers.command import WeightTransport


def has_driver() -> bool:
    """Whether NVIDIA's driver is here; CUDA loads its library by this name."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def sees_gpu() -> bool:
    """`torch.cuda.is_available()`, which is False for sure without the driver."""
    if "torch" not in sys.modules and not has_driver():
        return False
    import torch

    return torch.cuda.is_available()


def weight_transport(section: ServerSection, *, colocated: bool = False) -> WeightTransport:
    """`section.weight_transport`, "auto" resolved: nccl where this process sees a GPU of its own, else gloo.

    Raises:
        ValueError: nccl between two processes on one GPU, which it refuses.
    """
    if colocated and section.weight_transport == "nccl":
        raise ValueError(
            "rollout.weight_transport 'nccl' cannot reach servers on the trainer's own GPUs (cluster.layout "
            "'colocated'): use 'auto', 'gloo', or 'ipc' with one GPU"
        )
    if section.weight_transport != "auto":
        return section.weight_transport
    return "nccl" if not colocated and sees_gpu() else "gloo"
