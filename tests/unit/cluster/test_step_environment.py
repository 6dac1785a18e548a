"""Which variables make a process a rank: those of a task, never those of the allocation around a shell."""

from __future__ import annotations

import pytest

from megatron_r1reward.cluster.step_environment import local_ranks, rank_of

ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_NNODES": "2"}
BATCH = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TASK = ALLOCATION | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (ALLOCATION, None),  # salloc's shell on the login node
        (BATCH, None),  # a batch script of the user's own
        (BATCH | {"SLURM_STEP_ID": str(0xFFFFFFFA), "SLURM_STEP_NUM_TASKS": "4"}, None),  # salloc's interactive step
        (BATCH | {"SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun --pty bash
        (TASK, (3, 4, 1)),
        (TASK | {"SLURM_NTASKS": "16"}, (3, 4, 1)),  # the step is smaller than the job
        (TASK | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (1, 2, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0)),
        ({"RANK": "1"}, None),
    ],
)
def test_rank_of(environment: dict[str, str], expected: tuple[int, int, int] | None) -> None:
    assert rank_of(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        (BATCH, 1),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({"RANK": "5", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 8),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 2),  # nobody says how many machines there are
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}, 2),
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "1"}, 1),
        (TASK, 4),
    ],
)
def test_ranks_of_this_machine(environment: dict[str, str], expected: int) -> None:
    assert local_ranks(environment) == expected
