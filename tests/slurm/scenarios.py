"""What happens to real jobs, one function per story; each returns what its tests look at."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import Cluster, Job, tool, until
from run_files import write_inputs

from megatron_r1reward.monitor.run_state import RunDir

# n5 to n7 are kept for the story in which one of them dies.
NOT_THE_DOOMED = ("--exclude=n5,n6,n7",)
TWO_NODES = ("--oversubscribe", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=3", "--mem=1500", "--time=20")
ONE_SERVER = ("--oversubscribe", "--nodes=1", "--gpus-per-node=1", "--cpus-per-task=4", "--mem=3000", "--time=20")
ONE_SERVER += NOT_THE_DOOMED
TOKEN = {"R1REWARD_SERVER_TOKEN": "of-all-jobs-that-share-a-judge"}
_one_with_servers = threading.Lock()  # two stages with vLLM servers at a time would be short of memory


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Inputs of all jobs."""

    cluster: Cluster
    folder: Path
    stopping: threading.Event = field(default_factory=threading.Event)  # the tests end early: programs shall end, too

    def program(self, *command: str | Path, **options: Any) -> tuple[int, str]:
        """Run a program beside the jobs; exit code, and its output and messages together."""
        with tempfile.TemporaryFile("w+") as text:
            process = subprocess.Popen(list(map(str, command)), stdout=text, stderr=subprocess.STDOUT, **options)
            while process.poll() is None:
                if self.stopping.wait(0.3):
                    process.terminate()
                    process.wait()
            text.seek(0)
            return process.returncode, text.read()

    @classmethod
    def make(cls, cluster: Cluster, folder: Path) -> Bench:
        write_inputs(folder)
        return cls(cluster=cluster, folder=folder)

    def sft(self, name: str, *overrides: str, options: tuple[str, ...] = NOT_THE_DOOMED) -> Job:
        output = self.folder / name
        return self.cluster.submit(
            "sft_stage.sh",
            self.folder / "sft.toml",
            f"run.output_dir={output}",
            *overrides,
            output=output,
            options=(*TWO_NODES, *options),
        )

    def rl(self, name: str, *overrides: str, options: tuple[str, ...] = ()) -> Job:
        """Trainer on two nodes with two (fake) GPUs each, rollout server and judge on those of a third."""
        shape = ("--oversubscribe", "--nodes=3", "--gpus-per-node=2", "--cpus-per-task=4", "--mem=4000", "--time=20")
        output = self.folder / name
        return self.cluster.submit(
            "rl_stage.sh",
            self.folder / "rl.toml",
            f"run.output_dir={output}",
            *overrides,
            output=output,
            options=(*(options or shape), *NOT_THE_DOOMED),
        )

    def wait_for_cold_start(self) -> None:
        """The RL jobs begin with the model that the reference job trains."""
        run = RunDir(root=self.folder / "reference")
        until(lambda: run.done.exists() or run.exit_report.exists(), "end of the cold start")
        until(run.done.exists, "success of the cold start", timeout_s=5)


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Jobs one after the other."""

    sft: Job
    evaluation: Job
    conversion: Job


def reference(bench: Bench) -> Chain:
    """slurm/pipeline.sh: a cold start that nobody disturbs, then its evaluation; slurm/convert.sh on its checkpoint."""
    folder = bench.folder
    options = {"sft": (*TWO_NODES, *NOT_THE_DOOMED, "--nodelist=n1,n2"), "eval": ONE_SERVER}
    ids = bench.cluster.chain(folder / "sft.toml", "-", "-", folder / "eval.toml", folder=folder, options=options)
    sft = Job(id=ids["sft"], run=RunDir(root=folder / "reference"), folder=folder)
    evaluation = Job(id=ids["eval"], run=RunDir(root=folder / "evaluation"), folder=folder)
    conversion = bench.cluster.submit(
        "convert.sh",
        "export",
        sft.run.root / "checkpoints" / "step-00000030",
        folder / "exported",
        output=folder / "exported",
        options=("--oversubscribe", "--mem=1500", *NOT_THE_DOOMED, f"--dependency=afterok:{sft.id}"),
    )
    return Chain(sft=sft.wait(), evaluation=evaluation.wait(), conversion=conversion.wait())


def preempted(bench: Bench) -> Job:
    """On the nodes of the reference job, at the same time, in a container whose mounts alone lead to the data."""
    container = {
        "cluster.container_image": "any.sqsh",
        "cluster.container_python": sys.executable,
        "cluster.container_mounts": json.dumps([f"{bench.folder}/data:{bench.folder}/mounted"]),
        "data.train": f"{bench.folder}/mounted/sft.jsonl",
        "checkpoint.save_every": "1000",  # only the request saves
    }
    overrides = [f"{key}={value}" for key, value in container.items()]
    job = bench.sft("preempted", *overrides, options=(*NOT_THE_DOOMED, "--nodelist=n1,n2"))
    job.wait_step(3)
    tool("scancel", "-b", "-s", "USR1", job.id)
    return job.wait()


def out_of_time_then_cancelled(bench: Bench) -> Job:
    """The limit comes near while the trainer stands still, so the story does not depend on how fast this machine is."""
    overrides = ("sft.steps=1000", "checkpoint.save_every=1000", "cluster.walltime_margin_s=120")
    job = bench.sft("out-of-time", *overrides, options=(*NOT_THE_DOOMED, "--signal=B:USR1@1"))
    job.wait_step(3)
    with job.held("worker", "sft"):
        tool("scontrol", "update", f"JobId={job.id}", "EndTime=now+150")
        until(job.run.stop.exists, "request to save before the time limit")
    until(lambda: job.restarts == 1, "requeue at the time limit")
    tool("scontrol", "update", f"JobId={job.id}", "TimeLimit=20")
    job.wait_step(31)
    tool("scancel", job.id)
    return job.wait()


def crashed_in_a_chain(bench: Bench) -> tuple[Job, Job]:
    """slurm/pipeline.sh: the first stage loses a rank, the second must not wait for ever."""
    folder = bench.folder / "chain"
    folder.mkdir()
    run = RunDir(root=folder / "run")
    files = (bench.folder / "sft.toml", "-", "-", bench.folder / "eval.toml")
    options = {"sft": (*TWO_NODES, *NOT_THE_DOOMED), "eval": ONE_SERVER}
    ids = bench.cluster.chain(*files, f"run.output_dir={run.root}", folder=folder, options=options)
    parent, child = (Job(id=ids[stage], run=run, folder=folder) for stage in ("sft", "eval"))
    parent.wait_step(2)
    parent.kill_one(signal.SIGSEGV, "worker", "sft", procid=3)
    return parent.wait(), child.wait()


def node_lost(bench: Bench) -> Job:
    """The second node of the trainer loses its power after a checkpoint; a third one is free."""
    job = bench.sft("node-lost", options=("--exclude=n1,n2,n3,n4",))
    job.wait_step(11)
    lost = tool("scontrol", "show", "hostnames", job.field("NodeList")).split()[1]
    bench.cluster.chaos("kill-node", lost[1:])
    try:
        until(lambda: job.restarts == 1, "requeue after the loss of a node")
        return job.wait()
    finally:
        bench.cluster.chaos("start-node", lost[1:])


def rl_finished(bench: Bench) -> Job:
    bench.wait_for_cold_start()
    with _one_with_servers:
        return bench.rl("rl").wait()


def rl_local(bench: Bench) -> Path:
    """The same run file without Slurm."""
    bench.wait_for_cold_start()
    output = bench.folder / "rl-local"
    command = [sys.executable, "-m", "megatron_r1reward.cli", "launch", "--local", "rl", bench.folder / "rl.toml"]
    with _one_with_servers:
        code, text = bench.program(*command, f"run.output_dir={output}")
    assert code == 0, text[-3000:]
    return output


def rl_server_does_not_start(bench: Bench) -> Job:
    with _one_with_servers:
        return bench.rl("rl-no-start", f"model.path={bench.folder}/model", 'rollout.extra_args=["--no-such"]').wait()


def rl_server_dies(bench: Bench) -> Job:
    bench.wait_for_cold_start()
    with _one_with_servers:
        job = bench.rl("rl-server-dies", "rl.steps=500")
        job.wait_step(1)
        job.kill_one(signal.SIGKILL, "megatron_r1reward.rollout.vllm_main", "judge")
        return job.wait()


def rl_heterogeneous(bench: Bench) -> Job:
    """Trainer and rollout server on one kind of node, the judge on another."""
    bench.wait_for_cold_start()
    options = ("--oversubscribe", "--nodes=2", "--gpus-per-node=3", "--cpus-per-task=6", "--mem=4000", "--time=20")
    options += (*NOT_THE_DOOMED, ":", "--nodes=1", "--gpus-per-node=1", "--cpus-per-task=2", "--mem=4000")
    overrides = ("cluster.judge_het_group=1", "cluster.trainer_nodes=2", "cluster.ranks_per_node=2")
    with _one_with_servers:
        return bench.rl("rl-het", *overrides, options=options).wait()
