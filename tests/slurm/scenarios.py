"""What happens to real jobs, one function per story; each returns what its tests look at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import REPOSITORY, Cluster, Job, tool, until

from megatron_r1reward.data.digits import build_digits
from megatron_r1reward.launch.demo import write_demo_model
from megatron_r1reward.monitor.run_state import RunDir

SFT_TOML = """
[run]
output_dir = "unset"
local_ranks = 4
num_threads = 1
[model]
path = "{folder}/model"
precision = "fp32"
[data]
train = "{folder}/data/sft.jsonl"
token_budget = 2048
[optimizer]
lr = 3e-3
[sft]
steps = 30
global_batch_size = 8
[checkpoint]
save_every = 10
[monitor]
tensorboard = false
[cluster]
ranks_per_node = 2
walltime_margin_s = 15
grace_s = 10
"""
RL_TOML = """
[run]
output_dir = "unset"
local_ranks = 4
num_threads = 1
[model]
path = "{folder}/model"
precision = "fp32"
[data]
train = "{folder}/data/pool.jsonl"
token_budget = 2048
[optimizer]
lr = 1e-3
warmup_fraction = 0.0
[rl]
steps = 3
rollout_batch_size = 8
train_batch_size = 8
[algorithm]
entropy_coefficient = 0.01  # the untrained model earns no reward: this gives it a gradient all the same
[sampling]
max_tokens = 24
[rollout]
dtype = "float32"
max_model_len = 512
max_num_seqs = 8
kv_cache_bytes = 67108864
[judge]
model_path = "{folder}/model"
dtype = "float32"
max_model_len = 512
max_num_seqs = 8
kv_cache_bytes = 67108864
max_tokens = 4
[checkpoint]
save_every = 100
[monitor]
tensorboard = false
[cluster]
grace_s = 20
"""
# Two nodes of four of which n5 to n7 are kept for the story in which one dies.
TWO_NODES = ("--oversubscribe", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=3", "--mem=1500", "--time=20")
NOT_THE_DOOMED = ("--exclude=n5,n6,n7",)
_one_with_servers = threading.Lock()  # two stages with vLLM servers at a time would be short of memory


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Inputs of all jobs."""

    cluster: Cluster
    folder: Path

    @classmethod
    def make(cls, cluster: Cluster, folder: Path) -> Bench:
        data = folder / "data"
        build_digits(data, seed=0, sft_rows=200, pool_rows=60, heldout_pairs=8, judge_rows=40)
        write_demo_model(folder / "model", [data / "sft.jsonl", data / "judge_sft.jsonl"], seed=0)
        for name, text in (("sft.toml", SFT_TOML), ("rl.toml", RL_TOML)):
            (folder / name).write_text(text.format(folder=folder))
        return cls(cluster=cluster, folder=folder)

    def sft(self, name: str, *overrides: str, options: tuple[str, ...] = NOT_THE_DOOMED) -> Job:
        options = (*TWO_NODES, *options)
        return self.cluster.submit(
            "sft_stage.sh", self.folder / "sft.toml", self.folder / name, *overrides, options=options
        )

    def rl(self, name: str, *overrides: str, options: tuple[str, ...] = ()) -> Job:
        """Trainer on two nodes with two (fake) GPUs each, rollout server and judge on those of a third."""
        shape = ("--oversubscribe", "--nodes=3", "--gpus-per-node=2", "--cpus-per-task=4", "--mem=4000", "--time=20")
        return self.cluster.submit(
            "rl_stage.sh",
            self.folder / "rl.toml",
            self.folder / name,
            *overrides,
            options=(*(options or shape), *NOT_THE_DOOMED),
        )


def reference(bench: Bench) -> tuple[Job, Job]:
    """A run that nobody disturbs, and its twin at the same time on the same two nodes, in a container.

    The twin's data is at a place that only its mounts make: it could not train without them.
    """
    shared = (*NOT_THE_DOOMED, "--nodelist=n1,n2")
    first = bench.sft("reference", options=shared)
    container = {
        "cluster.container_image": "any.sqsh",
        "cluster.container_python": sys.executable,
        "cluster.container_mounts": json.dumps([f"{bench.folder}/data:{bench.folder}/mounted"]),
        "data.train": f"{bench.folder}/mounted/sft.jsonl",
    }
    second = bench.sft("twin", *(f"{key}={value}" for key, value in container.items()), options=shared)
    return first.wait(), second.wait()


def preempted(bench: Bench) -> Job:
    job = bench.sft("preempted", "checkpoint.save_every=1000")  # only the request saves
    job.wait_step(3)
    tool("scancel", "-b", "-s", "USR1", job.id)
    return job.wait()


def out_of_time(bench: Bench) -> Job:
    """The limit is moved to 40 s from now, so the story does not depend on how fast this machine starts Python."""
    job = bench.sft("out-of-time", "sft.steps=100")
    job.wait_step(3)
    tool("scontrol", "update", f"JobId={job.id}", "EndTime=now+40")
    until(lambda: job.restarts == 1, "requeue at the time limit")
    tool("scontrol", "update", f"JobId={job.id}", "TimeLimit=20")
    return job.wait()


def crashed_in_a_chain(bench: Bench) -> tuple[Job, Job]:
    """slurm/pipeline.sh: the first stage loses a rank, the second must not wait for ever."""
    folder = bench.folder / "chain"
    folder.mkdir()
    environment = {
        **os.environ,
        "SFT_OPTIONS": " ".join((*TWO_NODES, *NOT_THE_DOOMED)),
        "EVAL_OPTIONS": "--oversubscribe --nodes=1 --gpus-per-node=0 --mem=1500",
    }
    command = [str(REPOSITORY / "slurm" / "pipeline.sh"), f"--chdir={folder}", f"--output={folder}/job-%j.out"]
    command += [
        str(bench.folder / "sft.toml"),
        "-",
        "-",
        str(bench.folder / "sft.toml"),
        f"run.output_dir={folder}/run",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    ids = dict(line.split() for line in done.stdout.splitlines())
    run = RunDir(root=folder / "run")
    parent, child = (Job(id=ids[stage], run=run, folder=folder) for stage in ("sft", "eval"))
    parent.wait_step(2)
    parent.kill_one(signal.SIGSEGV, "worker", "sft", procid=3)
    return parent.wait(), child.wait()


def cancelled(bench: Bench) -> Job:
    job = bench.sft("cancelled", "sft.steps=1000")
    job.wait_step(1)
    tool("scancel", job.id)
    return job.wait()


def node_lost(bench: Bench) -> Job:
    """The second node of the trainer loses its power after a checkpoint; a third one is free."""
    job = bench.sft("node-lost", "sft.steps=30", options=("--exclude=n1,n2,n3,n4",))
    job.wait_step(11)
    lost = tool("scontrol", "show", "hostnames", job.field("NodeList")).split()[1]
    bench.cluster.chaos("kill-node", lost[1:])
    try:
        until(lambda: job.restarts == 1, "requeue after the loss of a node")
        return job.wait()
    finally:
        bench.cluster.chaos("start-node", lost[1:])


def rl_finished(bench: Bench) -> Job:
    with _one_with_servers:
        return bench.rl("rl").wait()


def rl_local(bench: Bench) -> Path:
    """The same run file without Slurm."""
    output = bench.folder / "rl-local"
    command = [sys.executable, "-m", "megatron_r1reward.cli", "launch", "--local", "rl", str(bench.folder / "rl.toml")]
    with _one_with_servers:
        done = subprocess.run(
            [*command, f"run.output_dir={output}"], capture_output=True, text=True, timeout=900, check=False
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def rl_server_does_not_start(bench: Bench) -> Job:
    with _one_with_servers:
        return bench.rl("rl-no-start", 'rollout.extra_args=["--no-such-option"]').wait()


def rl_server_dies(bench: Bench) -> Job:
    with _one_with_servers:
        job = bench.rl("rl-server-dies", "rl.steps=500")
        job.wait_step(1)
        job.kill_one(signal.SIGKILL, "megatron_r1reward.rollout.vllm_main", "judge")
        return job.wait()


def rl_heterogeneous(bench: Bench) -> Job:
    """Trainer and rollout server on one kind of node, the judge on another."""
    options = ("--oversubscribe", "--nodes=2", "--gpus-per-node=3", "--cpus-per-task=6", "--mem=4000", "--time=20")
    options += (*NOT_THE_DOOMED, ":", "--nodes=1", "--gpus-per-node=1", "--cpus-per-task=2", "--mem=4000")
    overrides = ("cluster.judge_het_group=1", "cluster.trainer_nodes=2", "cluster.ranks_per_node=2")
    with _one_with_servers:
        return bench.rl("rl-het", *overrides, options=options).wait()


# In this order: what waits for Slurm beside what computes.
SCENARIOS: dict[str, Callable[[Bench], Any]] = {
    "reference": reference,
    "rl_finished": rl_finished,
    "node_lost": node_lost,
    "rl_local": rl_local,
    "preempted": preempted,
    "rl_server_dies": rl_server_dies,
    "out_of_time": out_of_time,
    "rl_heterogeneous": rl_heterogeneous,
    "crashed_in_a_chain": crashed_in_a_chain,
    "rl_server_does_not_start": rl_server_does_not_start,
    "cancelled": cancelled,
}
