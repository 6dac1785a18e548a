"""What a job step inherits, and what a process's environment says about its ranks. Imports nothing of this package: the
doctor's probe runs it on nodes whose environment may be broken."""

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


_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # batch script, interactive shell and the like have no task of an srun


def rank_of(environment: Mapping[str, str]) -> tuple[int, int, int] | None:
    """(rank, world size, local rank) where torchrun, or an srun of several tasks, started this process; else None.

    torchrun's variables win. Of Slurm's, only those of the step count: a batch script and a shell inside an allocation
    have SLURM_NTASKS (and often SLURM_PROCID = 0) of the whole job, whose other tasks nobody starts.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank = int(environment["RANK"])
        return rank, int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", rank))
    step = environment.get("SLURM_STEP_ID", "")
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_PROCID" in environment:
        return int(environment["SLURM_PROCID"]), tasks, int(environment.get("SLURM_LOCALID", "0"))
    return None


def local_ranks(environment: Mapping[str, str]) -> int:
    """How many ranks torchrun or srun has started on this machine; 1 where neither has."""
    found = rank_of(environment)
    if found is None:
        return 1
    if "RANK" in environment:
        return int(environment.get("LOCAL_WORLD_SIZE", found[1]))
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", str(found[1]))  # e.g. "4(x2),3": of each node in turn
    counts = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks) for _ in range(int(times or 1))]
    return counts[min(int(environment.get("SLURM_NODEID", "0")), len(counts) - 1)]
