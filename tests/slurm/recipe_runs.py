"""The recipes through NeMo-Run: stages as one experiment, on the cluster and on this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs import REPOSITORY, Job, until
from scenarios import NO_JUDGE, NOT_THE_DOOMED, ONE_SERVER, TOKEN, VLLM, WITH_SERVERS, Bench

from megatron_r1reward.network.server_api import unhealthy

LAUNCHER = REPOSITORY / ".venv-recipes" / "bin" / "python"
SHAPE = ("exclusive=false", "mem=3000", "cpus_per_task=4", "time=00:20:00", "account=r1reward")
SHAPE += (f"exclude={NOT_THE_DOOMED[0].partition('=')[2]}",)
RUN_FILES = {"sft": "sft", "rl": "rl-unselected", "eval": "eval"}
SMALL = ("run.local_ranks=1", "sft:sft.steps=15", "sft:checkpoint.save_every=100")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One call of recipes/pipeline.py and what it left."""

    code: int
    text: str
    out: Path


def _pipeline(
    bench: Bench,
    executor: str,
    name: str,
    *overrides: str,
    stages: Iterable[str] = tuple(RUN_FILES),
    environment: Mapping[str, str] | None = None,
) -> Experiment:
    folder = bench.folder / name
    folder.mkdir()
    command: list[str | Path] = [LAUNCHER, str(REPOSITORY / "recipes" / "pipeline.py"), "--executor", executor]
    for stage in stages:
        command += [f"--{stage}", str(bench.folder / f"{RUN_FILES[stage]}.toml")]
    for setting in SHAPE:
        command += ["--slurm", setting]
    command += ["--output-dir", str(folder / "out"), "--python", str(REPOSITORY / ".venv" / "bin" / "python")]
    variables = {**os.environ, "NEMORUN_HOME": str(folder / "home"), "COLUMNS": "200", **(environment or {})}
    code, text = bench.program(*command, *SMALL, *overrides, env=variables, cwd=folder)
    return Experiment(code=code, text=text, out=folder / "out")


@dataclass(frozen=True, kw_only=True)
class WithSharedJudge:
    """The experiment, and the judge that it shared with whoever else would have asked."""

    experiment: Experiment
    judge: Job
    judge_problem_afterwards: str | None


def nemo_slurm(bench: Bench) -> WithSharedJudge:
    """On the cluster; the RL stage uses the server of a slurm/judge.sh job, which outlives it until the server dies,
    and that is once more than is allowed."""
    output = bench.folder / "shared-judge"
    judge = bench.cluster.submit(
        "judge.sh",
        bench.folder / "rl-unselected.toml",
        f"run.output_dir={output}",
        "judge.max_restarts=0",
        output=output,
        options=ONE_SERVER,
        environment=TOKEN,
    )
    until(lambda: judge.run.addresses("judge"), f"address of the judge\n{judge.output()}")
    shared = f"rl:cluster.shared_judge={output}"
    stages = ("sft", "rl")  # an evaluation as a job is in the chain of slurm/pipeline.sh
    experiment = _pipeline(bench, "slurm", "nemo-slurm", "rl:rl.steps=2", shared, stages=stages, environment=TOKEN)
    address = judge.run.addresses("judge")[0]
    problem = unhealthy(address.url.replace(address.host, f"127.0.0.{10 + int(address.host[1:])}"), attempts=1)
    judge.kill_one(signal.SIGKILL, VLLM, "judge")
    return WithSharedJudge(experiment=experiment, judge=judge.wait(), judge_problem_afterwards=problem)


def nemo_local(bench: Bench) -> Experiment:
    """RL with the run file, model and samples of slurm/pipeline.sh's. Without a judge: what it says is worth nothing
    there, so losses are the same."""
    bench.wait_for_hard_set()
    same = (f"model.path={bench.folder}/reference/hf", f"data.select={bench.folder}/annotate/hard.json", NO_JUDGE)
    rl = [f"rl:{override}" for override in (*same, "run.local_ranks=4")]
    with WITH_SERVERS:
        return _pipeline(bench, "local", "nemo-local", *rl, stages=("sft", "rl"))


def nemo_slurm_fails(bench: Bench) -> Experiment:
    return _pipeline(bench, "slurm", "nemo-slurm-fails", "sft:model.path=nowhere", f"rl:{NO_JUDGE}")


def nemo_local_fails(bench: Bench) -> Experiment:
    return _pipeline(bench, "local", "nemo-local-fails", "sft:model.path=nowhere", f"rl:{NO_JUDGE}")
