"""What Slurm knows about this job: its nodes, its time limit, its state. Read from `scontrol show job -d`.

One source, because the SLURM_* variables differ between versions, job kinds and ways to ask for GPUs.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from megatron_r1reward.cluster import commands
from megatron_r1reward.cluster.placement import Node, Site
from megatron_r1reward.cluster.step_environment import clean_environment

log = logging.getLogger(__name__)
_TIMEOUT_S = 60.0
# States of a job that goes on. Of one that is being ended, EndTime is when that began and not the time limit.
_ALIVE = ("RUNNING", "CONFIGURING", "SUSPENDED")

_PER_NODE = re.compile(r"^\s*Nodes=(\S+) CPU_IDs=(\S+) Mem=\S+ GRES=(\S*)", re.MULTILINE)
_GPUS = re.compile(r"gpu(?::[^:,(]+)?:(\d+)")


def run_tool(*command: str) -> str:
    """Standard output of a Slurm command.

    Raises:
        ValueError: it failed or did not answer; the message is Slurm's.
    """
    done = commands.run(command, timeout_s=_TIMEOUT_S)
    if done.missing:
        raise ValueError(f"{command[0]} is not on PATH: Slurm's commands are needed where the job script runs")
    if done.problem is not None:
        raise ValueError(f"{' '.join(command)}: {done.problem}")
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """One record of `scontrol show job -d`: a job, or one group of a heterogeneous job."""

    job_id: str
    group: int
    state: str
    reason: str
    restarts: int
    ends: float | None
    node_list: str
    nodes: tuple[tuple[str, int, int], ...]  # (hostlist expression, cores, GPUs) of nodes that are alike


def parse_jobs(text: str) -> tuple[JobRecord, ...]:
    """The records in the output of `scontrol show job -d`, by group."""
    records = []
    for block in re.split(r"\n(?=JobId=)", text.strip()):
        fields = dict(re.findall(r"(\w+)=(\S+)", block))
        if "JobId" not in fields:
            continue
        nodes = tuple(
            (names, _count_ids(cores), sum(map(int, _GPUS.findall(gres))))
            for names, cores, gres in _PER_NODE.findall(block)
        )
        records.append(
            JobRecord(
                job_id=fields["JobId"],
                group=int(fields.get("HetJobOffset", 0)),
                state=fields.get("JobState", "UNKNOWN"),
                reason=fields.get("Reason", "None"),
                restarts=int(fields.get("Restarts", 0)),
                ends=_seconds(fields.get("EndTime", "Unknown")),
                node_list=fields.get("NodeList", ""),
                nodes=nodes,
            )
        )
    return tuple(sorted(records, key=lambda record: record.group))


def _count_ids(text: str) -> int:
    """Size of a list such as "0-3,8"."""
    count = 0
    for part in text.split(","):
        first, _, last = part.partition("-")
        count += int(last or first) - int(first) + 1
    return count


def _seconds(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # "Unknown", "None", "NONE"
        return None


class SlurmJob:
    """The job that this process runs in."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        job_id = environment.get("SLURM_JOB_ID")
        if job_id is None:
            raise ValueError("SLURM_JOB_ID is not set: this is not a Slurm job")
        self.job_id = environment.get("SLURM_HET_JOB_ID") or job_id
        self.restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
        self._environment = environment

    def id_of_group(self, group: int) -> str:
        """The job id that the steps of a group of a heterogeneous job have."""
        return self._environment.get(f"SLURM_JOB_ID_HET_GROUP_{group}", self.job_id)

    def records(self) -> tuple[JobRecord, ...]:
        records = parse_jobs(run_tool("env", "-u", "SLURM_TIME_FORMAT", "scontrol", "show", "job", "-d", self.job_id))
        if not records:
            raise ValueError(f"scontrol knows no job {self.job_id}")
        return records

    def ends(self) -> float | None:
        """When the time limit ends the job; asked anew each time, since an administrator may extend it.

        None without a limit, and for a job that is being ended already.
        """
        records = self.records()
        if any(record.state not in _ALIVE for record in records):
            return None
        return min((record.ends for record in records if record.ends is not None), default=None)

    def site(self) -> Site:
        """Nodes, cores and GPUs of every group, in Slurm's order."""
        groups = []
        for record in self.records():
            rooms: dict[str, tuple[int, int]] = {}
            for names, cores, gpus in record.nodes:
                rooms |= dict.fromkeys(expand(names), (cores, gpus))
            nodes = (Node(name=name, cpus=rooms[name][0], gpus=rooms[name][1]) for name in expand(record.node_list))
            groups.append(tuple(nodes))
        return Site(groups=tuple(groups))

    def requeue(self) -> None:
        """Ask for another turn.

        Raises:
            ValueError: Slurm refuses (job submitted with --no-requeue), or somebody has cancelled the job meanwhile:
                Slurm would queue it again all the same.
        """
        first = self.records()[0]
        if first.state not in _ALIVE and first.reason == "None":  # the time limit and a lost node are reasons
            raise ValueError(f"job {self.job_id} has been cancelled")
        run_tool("scontrol", "requeue", self.job_id)


def expand(hostlist: str) -> list[str]:
    """Names in a hostlist expression such as "n[1-2,4]"."""
    return run_tool("scontrol", "show", "hostnames", hostlist).split()


def is_running(job_id: str) -> bool:
    """Whether a job still holds nodes; False for one that Slurm has forgotten.

    Raises:
        ValueError: Slurm does not say.
    """
    query = ["squeue", "-h", "-j", job_id, "-t", "running,completing,configuring,suspended", "-o", "%i"]
    done = commands.run(query, timeout_s=_TIMEOUT_S)
    if done.problem is not None and "Invalid job id" not in done.problem:
        raise ValueError(
            f"whether job {job_id} still runs is not known (squeue: {done.problem}): ask again when Slurm answers, or "
            "choose another run.output_dir"
        )
    return bool(done.stdout.strip())


def silent_nodes(nodes: Sequence[tuple[int | None, str]], timeout_s: float) -> tuple[str, ...]:
    """Which of these (het group, node) cannot run a step any more: each is asked to run `true`, all at once."""
    probes = {}
    for group, node in nodes:
        command = ["srun", "--overlap", "--mem=0", "-N1", "-n1", "-c1", "-w", node, "--input=none", "-J", "probe"]
        command += [] if group is None else [f"--het-group={group}"]
        probes[node] = subprocess.Popen(
            [*command, "true"],
            env=clean_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    lost = []
    for node, probe in probes.items():
        try:
            code = probe.wait(timeout_s)
        except subprocess.TimeoutExpired:
            probe.kill()
            probe.wait()
            code = None
        if code != 0:
            log.warning("node %s does not answer (%s)", node, "time-out" if code is None else f"exit code {code}")
            lost.append(node)
    return tuple(lost)
