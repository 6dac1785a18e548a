"""Stages that run in this very process: alone, or as one rank that a launcher of yours (torchrun) has started."""

from __future__ import annotations

import os

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.run_dir import RunDir


def under_a_launcher() -> bool:
    """Whether torchrun or srun started this process as one of several ranks."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def forget_stop_request(config: RunConfig) -> None:
    """A request that stopped an earlier run must not stop this one. Under a supervisor, that one empties `live/`."""
    RunDir(root=config.run.output_dir).stop.unlink(missing_ok=True)
