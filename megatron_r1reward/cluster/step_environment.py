"""What a job step inherits. Imports nothing: the doctor's probe runs it on nodes whose environment may be broken."""

from __future__ import annotations

import re
from collections.abc import Mapping

# What sbatch's options leave in the environment, and every srun would take for its own.
_INHERITED = re.compile(
    r"SLURM_(GPUS|GPUS_PER_\w+|NTASKS|NPROCS|NTASKS_PER_\w+|TASKS_PER_NODE|CPUS_PER_TASK|CPUS_PER_GPU|MEM_PER_\w+"
    r"|DISTRIBUTION|EXPORT_ENV|TRES_PER_TASK|CPU_BIND\w*|NNODES|EXCLUSIVE|JOB_NAME|TIMELIMIT|SIGNAL)"
)
# The trainer's own launch variables, should the submitting shell have had any.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what belongs to the batch step alone."""
    return {
        name: value
        for name, value in environment.items()
        if not _INHERITED.fullmatch(name) and name not in _RANK_VARIABLES
    }
