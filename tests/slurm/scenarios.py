"""What happens to real jobs, one function per story; each returns what its tests look at."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from jobs import PATIENCE_S, Cluster, Job, from_here, tool, until
from run_files import RESUMED_STEPS

from megatron_r1reward.run_dir import Address, ExitReport, RunDir

# n5 to n7 are kept for the story in which one of them dies.
NOT_THE_DOOMED = ("--exclude=n5,n6,n7",)
TWO_NODES = ("--oversubscribe", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=3", "--mem=1500", "--time=20")
ONE_SERVER = ("--oversubscribe", "--nodes=1", "--gpus-per-node=1", "--cpus-per-task=4", "--mem=3000", "--time=20")
ONE_SERVER += NOT_THE_DOOMED
# Trainer on two nodes with two (fake) GPUs each, rollout server and judge on those of a third.
THREE_NODES = ("--oversubscribe", "--nodes=3", "--gpus-per-node=2", "--cpus-per-task=4", "--mem=4000", "--time=20")
THREE_NODES += NOT_THE_DOOMED
# The steps of jobs that have two lives; the reference takes more of them.
RESUMED = (f"sft.steps={RESUMED_STEPS}",)
NO_JUDGE = "reward.use_judge=false"
VLLM = "megatron_r1reward.servers.vllm_main"
TOKEN = {"R1REWARD_SERVER_TOKEN": "of-all-jobs-that-share-a-judge"}
WITH_SERVERS = threading.Semaphore(2)  # of the stages with a rollout server and a judge, for the memory


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

    def rl(self, name: str, *overrides: str, options: tuple[str, ...] = THREE_NODES) -> Job:
        output = self.folder / name
        return self.cluster.submit(
            "rl_stage.sh",
            self.folder / "rl.toml",
            f"run.output_dir={output}",
            *overrides,
            output=output,
            options=options,
        )

    def wait_for_hard_set(self) -> None:
        """RL begins with the model that the chain's first stage trains, on the samples that its second selects."""
        trained, selected = RunDir(root=self.folder / "reference"), RunDir(root=self.folder / "annotate")
        until(lambda: trained.done.exists() or trained.exit_report.exists(), "end of the cold start")
        until(trained.done.exists, "success of the cold start", timeout_s=5)
        report = until(lambda: ExitReport.read(selected.exit_report), "end of the selection")
        assert report.outcome == "done", report


@dataclass(frozen=True, kw_only=True)
class Chain:
    """The jobs of slurm/pipeline.sh, one after the other, and one that converts what the first has trained."""

    sft: Job
    selection: Job
    rl: Job
    evaluation: Job
    conversion: Job


def reference(bench: Bench) -> Chain:
    """slurm/pipeline.sh with all stages, which nobody disturbs; slurm/convert.sh on the cold start's checkpoint."""
    folder = bench.folder
    files = [folder / f"{stage}.toml" for stage in ("sft", "annotate", "rl", "eval")]
    options = {"sft": (*TWO_NODES, *NOT_THE_DOOMED, "--nodelist=n1,n2"), "select": ONE_SERVER}
    options |= {"rl": THREE_NODES, "eval": ONE_SERVER}
    with WITH_SERVERS:  # no other could start before the cold start has ended
        ids = bench.cluster.chain(*files, folder=folder, options=options)
        outputs = {"sft": "reference", "select": "annotate", "rl": "rl", "eval": "evaluation"}
        sft, selection, rl, evaluation = (
            Job(id=ids[stage], run=RunDir(root=folder / output), folder=folder) for stage, output in outputs.items()
        )
        conversion = bench.cluster.submit(
            "convert.sh",
            "export",
            sft.run.root / "checkpoints" / "step-00000030",
            folder / "exported",
            output=folder / "exported",
            options=("--oversubscribe", "--mem=1500", *NOT_THE_DOOMED, f"--dependency=afterok:{sft.id}"),
        )
        for job in (sft, selection, rl):
            job.wait()
    return Chain(sft=sft, selection=selection, rl=rl, evaluation=evaluation.wait(), conversion=conversion.wait())


def preempted_out_of_time_then_cancelled(bench: Bench) -> Job:
    """On the nodes of the reference job, at the same time, in a container whose mounts alone lead to the data. Before
    each of its ends the trainer stands still, so the story does not depend on how fast this machine is."""
    settings = {
        "cluster.container_image": "any.sqsh",
        "cluster.container_python": sys.executable,
        "cluster.container_mounts": json.dumps([f"{bench.folder}/data:{bench.folder}/mounted"]),
        "data.train": f"{bench.folder}/mounted/sft.jsonl",
        "sft.steps": "1000",
        "checkpoint.save_every": "1000",  # only the requests save
        "cluster.walltime_margin_s": "120",
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    options = (*NOT_THE_DOOMED, "--nodelist=n1,n2", "--signal=B:USR1@1")
    job = bench.sft("three-lives", *overrides, options=options)
    job.wait_step(3)
    with job.held("worker", "sft"):
        tool("scancel", "-b", "-s", "USR1", job.id)
        until(job.run.stop.exists, "request to save")
    until(lambda: job.restarts == 1, "requeue after the preemption", every_s=1.0)
    job.wait_step(job.saved_step(0) + 2)
    with job.held("worker", "sft"):
        tool("scontrol", "update", f"JobId={job.id}", "EndTime=now+150")
        until(job.run.stop.exists, "request to save before the time limit")
    until(lambda: job.restarts == 2, "requeue at the time limit", every_s=1.0)
    tool("scontrol", "update", f"JobId={job.id}", "TimeLimit=20")
    job.wait_step(job.saved_step(1) + 2)
    tool("scancel", job.id)
    return job.wait()


def crashed_in_a_chain(bench: Bench) -> tuple[Job, Job]:
    """slurm/pipeline.sh: the first stage loses the rank of its second node, the second must not wait for ever."""
    folder = bench.folder / "chain"
    folder.mkdir()
    run = RunDir(root=folder / "run")
    files = (bench.folder / "sft.toml", "-", "-", bench.folder / "eval.toml")
    options = {"sft": (*TWO_NODES, *NOT_THE_DOOMED), "eval": ONE_SERVER}
    ids = bench.cluster.chain(*files, f"run.output_dir={run.root}", folder=folder, options=options)
    parent, child = (Job(id=ids[stage], run=run, folder=folder) for stage in ("sft", "eval"))
    parent.wait_step(2)
    with parent.held("worker", "sft"):  # else a peer that lost its connection may be heard before the one that crashed
        for number in (signal.SIGSEGV, signal.SIGCONT):
            parent.kill_one(number, "worker", "sft", procid=1)
        ended = parent.wait()
    return ended, child.wait()


def node_lost(bench: Bench) -> Job:
    """The second node of the trainer loses its power after a checkpoint; a third one is free."""
    job = bench.sft("node-lost", *RESUMED, "checkpoint.save_every=4", options=("--exclude=n1,n2,n3,n4",))
    job.wait_step(5)
    lost = tool("scontrol", "show", "hostnames", job.field("NodeList")).split()[1]
    with job.held("worker", "sft"):
        bench.cluster.chaos("kill-node", lost[1:])
    try:
        until(lambda: job.restarts == 1, "requeue after the loss of a node", every_s=1.0)
        return job.wait()
    finally:
        bench.cluster.chaos("start-node", lost[1:])


def rl_server_does_not_start(bench: Bench) -> Job:
    overrides = (f"model.path={bench.folder}/model", 'rollout.extra_args=["--no-such"]', NO_JUDGE)
    return bench.rl("rl-no-start", *overrides).wait()


@dataclass(frozen=True, kw_only=True)
class Service:
    """A job of slurm/serve.sh that has ended, and what it answered before."""

    job: Job
    url: str
    ready: int  # status of /ready
    without_token: int
    compared: dict[str, Any]
    in_progress: tuple[int, dict[str, Any]]  # status and answer of what was asked when the job was told to end


def served_and_drained(bench: Bench) -> Service:
    """slurm/serve.sh with the model of the cold start, asked from elsewhere; told to end in the middle of a request."""
    trained = RunDir(root=bench.folder / "reference")
    until(trained.done.exists, "success of the cold start")
    output, token = bench.folder / "serve", "known-to-clients"
    image = next((bench.folder / "data" / "images").iterdir()).read_bytes()
    body = {
        "question": "Which digit is it?",
        "responses": ["The digit is 7.", "The digit is 3."],
        "images": [f"data:image/png;base64,{base64.b64encode(image).decode()}"],
    }
    with WITH_SERVERS, ThreadPoolExecutor(1) as other:
        job = bench.cluster.submit(
            "serve.sh",
            bench.folder / "serve.toml",
            f"run.output_dir={output}",
            "serve.host=0.0.0.0",
            "serve.port=0",
            "cluster.grace_s=120",
            output=output,
            options=ONE_SERVER,
            environment={"R1REWARD_SERVE_TOKEN": token},
        )

        def address() -> Address | None:
            assert not job.run.exit_report.exists(), job.output()
            return Address.read(job.run.address("serve"))

        url = until(address, f"address of the service\n{job.output()}").url
        with httpx.Client(base_url=from_here(url), timeout=PATIENCE_S, trust_env=False) as http:
            without_token = http.post("/v1/compare", json=body).status_code
            ready = http.get("/ready").status_code
            http.headers["Authorization"] = f"Bearer {token}"
            compared = http.post("/v1/compare", json=body).json()
            many = body | {"question": "Another digit?", "votes": 16}  # seconds of work
            asked = other.submit(http.post, "/v1/compare", json=many)
            metrics = "r1reward_requests_in_progress 1.0"
            watch = {"headers": dict(http.headers), "trust_env": False, "timeout": PATIENCE_S}
            until(lambda: metrics in httpx.get(f"{from_here(url)}/metrics", **watch).text or asked.done(), "request")
            tool("scancel", "--batch", "--signal=TERM", job.id)
            answer = asked.result()
        return Service(
            job=job.wait(),
            url=url,
            ready=ready,
            without_token=without_token,
            compared=compared,
            in_progress=(answer.status_code, answer.json()),
        )


@dataclass(frozen=True, kw_only=True)
class Colocated:
    """A job, and which GPUs its components saw (CUDA_VISIBLE_DEVICES), by node."""

    job: Job
    trainer: set[tuple[str, str]]
    rollout: set[tuple[str, str]]


def rl_servers_hang_and_die(bench: Bench) -> Colocated:
    """The rollout server sleeps on the trainer's GPUs, the judge is on another kind of node. After three steps that
    nobody disturbs the only rollout server hangs while the judge's whole step is killed; later the rollout server's
    is."""
    bench.wait_for_hard_set()
    options = ("--oversubscribe", "--nodes=2", "--gpus-per-node=2", "--cpus-per-task=6", "--mem=4000", "--time=20")
    options += (*NOT_THE_DOOMED, ":", "--nodes=1", "--gpus-per-node=1", "--cpus-per-task=2", "--mem=4000")
    overrides = ("rl.steps=6", "cluster.layout=colocated", "cluster.judge_het_group=1")
    overrides += ("cluster.trainer_nodes=2", "cluster.ranks_per_node=2")
    overrides += ("rollout.health_interval_s=1", "rollout.health_failures=2", "judge.health_interval_s=1")
    overrides += ("rollout.health_timeout_s=30", "judge.health_timeout_s=30")  # a busy machine is no hang
    with WITH_SERVERS:
        job = bench.rl("rl-mended", *overrides, options=options)
        job.wait_step(3)
        trainer, rollout = job.gpus("worker", "rl"), job.gpus("server", "rollout")
        for number, words in ((signal.SIGKILL, ("server", "judge")), (signal.SIGSTOP, (VLLM, "policy"))):
            for pid in job.processes(*words):
                os.kill(pid, number)
        # At once, before steps go on: a run without its rollout server waits for the next start of the judge, too.
        until(lambda: job.started("rollout-0") == 1, f"rollout-0 of job {job.id} started again\n{job.output()}")
        for pid in job.processes("server", "rollout"):
            os.kill(pid, signal.SIGKILL)
        return Colocated(job=job.wait(), trainer=trainer, rollout=rollout)
