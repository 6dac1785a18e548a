"""What is read from Slurm's own words."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from megatron_r1reward.cluster.placement import Node, Placement, Site
from megatron_r1reward.cluster.slurm import SlurmJob, is_running, parse_jobs
from megatron_r1reward.cluster.step_environment import clean_environment
from megatron_r1reward.config.schema import ClusterSection
from megatron_r1reward.launch.slurm_steps import SlurmLauncher, first_failure
from megatron_r1reward.launch.steps import StepEnd
from megatron_r1reward.run_dir import Component, RunDir

HET = """JobId=7 HetJobId=7 HetJobOffset=0 JobName=rl
   HetJobIdSet=7-8
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:02 TimeLimit=00:05:00 TimeMin=N/A
   StartTime=2026-03-01T03:18:51 EndTime=2026-03-01T03:23:51 Deadline=N/A
   NodeList=n[1-2,4]
   JOB_GRES=gpu:a100:12
     Nodes=n[1-2] CPU_IDs=0-3,8-11 Mem=1000 GRES=gpu:a100:4(IDX:0-3)
     Nodes=n4 CPU_IDs=0 Mem=1000 GRES=
   Command=/repo/slurm/rl_stage.sh run.toml

JobId=8 HetJobId=7 HetJobOffset=1 JobName=rl
   JobState=RUNNING Reason=None
   Restarts=2
   StartTime=2026-03-01T03:18:51 EndTime=Unknown Deadline=N/A
   NodeList=n7
     Nodes=n7 CPU_IDs=4-5 Mem=1000 GRES=gpu:2(IDX:0-1),shard:0
"""


def test_records_of_a_heterogeneous_job() -> None:
    first, second = parse_jobs(HET)
    assert (first.job_id, first.group, first.state, first.restarts) == ("7", 0, "RUNNING", 2)
    assert first.nodes == (("n[1-2]", 8, 4), ("n4", 1, 0))
    assert first.ends == datetime(2026, 3, 1, 3, 23, 51).timestamp()
    assert (second.group, second.nodes, second.ends) == (1, (("n7", 2, 2),), None)


def test_the_first_failing_task_is_the_cause() -> None:
    messages = (
        "srun: job step created\n"
        "srun: error: n2: task 3: Segmentation fault\n"
        "srun: Terminating StepId=9.0\n"
        "srun: error: n1: tasks 0-1: Terminated\n"
    )
    assert first_failure(messages) == StepEnd(code=139, what="task 3 on n2 was killed by SIGSEGV")
    assert first_failure("srun: error: n1: tasks 0,2: Exited with exit code 13\n") == StepEnd(
        code=13, what="task 0,2 on n1 exited with code 13"
    )
    late = "srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 3: Segmentation fault\n"
    assert first_failure(late) == StepEnd(code=139, what="task 3 on n2 was killed by SIGSEGV")
    killed = "srun: error: n1: task 0: Killed\nsrun: error: n2: task 3: Out Of Memory\n"
    assert first_failure(killed) == StepEnd(code=137, what="task 3 on n2 ran out of memory: raise the job's --mem")
    aborted = "srun: error: n1: task 0: Exited with exit code 1\nsrun: error: n2: task 3: Aborted (core dumped)\n"
    assert first_failure(aborted) == StepEnd(code=1, what="task 0 on n1 exited with code 1"), "peers may abort"
    assert first_failure("srun: error: Unable to create step: Invalid node name\n") is None


def placement(**changes: object) -> Placement:
    component = Component(name="trainer", nodes=("n1", "n2"), tasks=8, gpus_per_node=4)
    return Placement(**{"component": component, "kind": "driver", "cpus_per_task": 3, **changes})  # type: ignore[arg-type]


def launcher(tmp_path: Path, section: ClusterSection, *, gpus: int = 8, groups: int = 1) -> SlurmLauncher:
    nodes = tuple((Node(name=f"n{i}", gpus=gpus, cpus=16),) for i in range(groups))
    return SlurmLauncher(
        RunDir(root=tmp_path), SlurmJob({"SLURM_JOB_ID": "9"}), section, Site(groups=nodes), token="secret"
    )


def test_srun_arguments(tmp_path: Path) -> None:
    command = launcher(tmp_path, ClusterSection(srun_args=("--mpi=pmix",))).srun(placement(), tmp_path / "t.log")
    assert {"--exact", "--mem=0", "--kill-on-bad-exit=1", "--export=ALL", "--label", "--mpi=pmix"} <= set(command)
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--nodelist=n1,n2", "--gpus-per-node=4"} <= set(command)
    assert not any(item.startswith(("--het-group", "--container")) for item in command)


def test_steps_that_share_gpus_ask_for_enough_of_them(tmp_path: Path) -> None:
    part = Component(name="rollout-1", nodes=("n1",), tasks=1, gpus_per_node=2)
    shared = placement(component=part, kind="rollout", overlap=True, gpu_ids=(2, 3))
    command = launcher(tmp_path, ClusterSection()).srun(shared, tmp_path / "r.log")
    assert {"--overlap", "--gpus-per-node=4"} <= set(command)
    assert "--exact" not in command


def test_containers_and_groups_are_options(tmp_path: Path) -> None:
    section = ClusterSection(container_image="image.sqsh", container_mounts=("/data:/data:ro",))
    command = launcher(tmp_path, section, gpus=0, groups=2).srun(placement(group=1), tmp_path / "t.log")
    assert {"--container-image=image.sqsh", "--het-group=1"} <= set(command)
    (mounts,) = (item for item in command if item.startswith("--container-mounts="))
    assert f"{tmp_path}:{tmp_path}" in mounts
    assert mounts.endswith(",/data:/data:ro")
    assert not any("gpus" in item for item in command), "clusters without GPUs refuse the option"


def test_options_of_sbatch_do_not_reach_srun() -> None:
    names = ("SLURM_NTASKS", "SLURM_GPUS_PER_NODE", "SLURM_MEM_PER_NODE", "SLURM_EXPORT_ENV", "RANK")
    assert clean_environment(dict.fromkeys(names, "1") | {"SLURM_JOB_ID": "9"}) == {"SLURM_JOB_ID": "9"}


def a_job_that_scontrol_shows(monkeypatch, words: str) -> tuple[SlurmJob, list[tuple[str, ...]]]:
    asked: list[tuple[str, ...]] = []

    def run_tool(*command: str) -> str:
        asked.append(command)
        return f"JobId=9 JobName=rl\n   {words}\n   EndTime=2026-03-01T03:23:51\n   NodeList=n1\n"

    monkeypatch.setattr("megatron_r1reward.cluster.slurm.run_tool", run_tool)
    return SlurmJob({"SLURM_JOB_ID": "9"}), asked


def test_a_job_that_is_being_ended_has_no_time_limit(monkeypatch) -> None:
    """Its EndTime is now: taken for the time limit, a cancelled job would ask for another turn."""
    running, _ = a_job_that_scontrol_shows(monkeypatch, "JobState=RUNNING Reason=None")
    assert running.ends() == datetime(2026, 3, 1, 3, 23, 51).timestamp()
    cancelled, _ = a_job_that_scontrol_shows(monkeypatch, "JobState=COMPLETING Reason=None")
    assert cancelled.ends() is None


def test_a_cancelled_job_is_not_queued_again(monkeypatch) -> None:
    cancelled, asked = a_job_that_scontrol_shows(monkeypatch, "JobState=COMPLETING Reason=None")
    with pytest.raises(ValueError, match="has been cancelled"):
        cancelled.requeue()
    assert not any("requeue" in command for command in asked)
    timed_out, asked = a_job_that_scontrol_shows(monkeypatch, "JobState=COMPLETING Reason=TimeLimit")
    timed_out.requeue()
    assert ("scontrol", "requeue", "9") in asked


@pytest.mark.parametrize(
    ("squeue", "runs"),
    [
        ("echo 9", True),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1", None),
    ],
)
def test_a_job_counts_as_gone_only_when_slurm_says_so(squeue: str, runs: bool | None, tmp_path, monkeypatch) -> None:
    """Two supervisors would write into one run directory otherwise."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    if runs is None:
        with pytest.raises(ValueError, match=r"whether job 9 still runs is not known .*contact slurm controller"):
            is_running("9")
    else:
        assert is_running("9") is runs
