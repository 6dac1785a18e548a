"""The GPUs that a process sees, and how it passes some of them on to the processes that it starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from megatron_r1reward.cluster import commands

log = logging.getLogger(__name__)
VARIABLE = "CUDA_VISIBLE_DEVICES"


def count_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that a process with this environment may use."""
    outer = environment.get(VARIABLE)
    if outer is not None:
        return len([name for name in outer.split(",") if name.strip() and name.strip() != "-1"])
    listing = commands.run(["nvidia-smi", "-L"], timeout_s=60)
    if listing.problem is not None and not listing.missing:
        log.warning("nvidia-smi -L: %s: this machine counts as one without GPUs", listing.problem)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def names_of(gpu_ids: Sequence[int], environment: Mapping[str, str]) -> str:
    """For a child's CUDA_VISIBLE_DEVICES: these GPUs, counted among those that this environment shows.

    Raises:
        ValueError: it shows fewer.
    """
    outer = environment.get(VARIABLE)
    names = outer.split(",") if outer else None
    if names is not None and max(gpu_ids, default=0) >= len(names):
        raise ValueError(
            f"GPUs {list(gpu_ids)} of those that {VARIABLE}={outer} shows, which are {len(names)}, counted from 0: "
            "change gpu_ids or the variable"
        )
    return ",".join(names[index] if names else str(index) for index in gpu_ids)
