"""The recipes through NeMo-Run: SFT -> RL -> evaluation as one experiment, on the cluster and on this machine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from jobs import REPOSITORY, tool
from scenarios import RL_TOML, SFT_TOML, Bench

from megatron_r1reward.launch.status.gather import read_status

LAUNCHER = REPOSITORY / ".venv-recipes" / "bin" / "python"
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not LAUNCHER.exists(), reason="no .venv-recipes: make recipes builds NeMo-Run's environment"),
]
SHAPE = ("exclusive=false", "oversubscribe=true", "mem=3000", "cpus_per_task=4", "time=00:20:00", "account=r1reward")
SMALL = (
    "run.local_ranks=1",
    "sft:sft.steps=3",
    "sft:sft.global_batch_size=8",
    "rl:rl.steps=2",
    "rl:reward.use_judge=false",
    "rl:sampling.max_tokens=16",
    "eval:evaluation.max_pairs=1",
    "eval:evaluation.samples=1",
    "eval:evaluation.voting=[1]",
    "eval:sampling.max_tokens=16",
)


@pytest.fixture(scope="module")
def run_files(bench: Bench) -> Path:
    """The run files of the other jobs here, and one for the evaluation."""
    folder = bench.folder / "nemo-run"
    folder.mkdir()
    for name, text in (("sft.toml", SFT_TOML), ("rl.toml", RL_TOML), ("eval.toml", RL_TOML)):
        tail = f'[evaluation]\ndata = "{bench.folder}/data/heldout.jsonl"\n' if name == "eval.toml" else ""
        (folder / name).write_text(text.format(folder=bench.folder).replace("ranks_per_node = 2\n", "") + tail)
    return folder


def pipeline(folder: Path, executor: str, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [str(LAUNCHER), str(REPOSITORY / "recipes" / "pipeline.py"), "--executor", executor]
    for stage in ("sft", "rl", "eval"):
        command += [f"--{stage}", str(folder / f"{stage}.toml")]
    for setting in SHAPE:
        command += ["--slurm", setting]
    command += ["--output-dir", str(out), "--python", str(REPOSITORY / ".venv" / "bin" / "python"), *SMALL, *more]
    environment = {**os.environ, "NEMORUN_HOME": str(folder / "home"), "COLUMNS": "200"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def losses(out: Path, stage: str, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (out / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def on_slurm(run_files: Path) -> Path:
    out = run_files / "slurm"
    done = pipeline(run_files, "slurm", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "eval: SUCCEEDED" in done.stdout
    return out


def test_every_stage_was_a_job_of_its_own(on_slurm: Path) -> None:
    jobs = set()
    for stage in ("sft", "rl", "eval"):
        status = read_status(on_slurm / stage)
        assert status.state == "done"
        assert status.info is not None
        assert status.info.launcher == "slurm"
        jobs.add(status.info.job_id)
    assert len(jobs) == 3
    states = tool("sacct", "-n", "-X", "-P", "-j", ",".join(map(str, sorted(jobs))), "-o", "State").split()
    assert states == ["COMPLETED"] * 3
    assert json.loads((on_slurm / "eval" / "evaluation.json").read_text())["counts"]["pairs"] == 1


def test_the_local_executor_gives_the_same_losses(on_slurm: Path, run_files: Path) -> None:
    out = run_files / "local"
    done = pipeline(run_files, "local", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(out, "sft", "sft/loss") == pytest.approx(losses(on_slurm, "sft", "sft/loss"), rel=1e-6)
    assert (out / "eval" / "evaluation.json").exists()
    assert read_status(out / "rl").state == "done"


@pytest.mark.parametrize("executor", ["slurm", "local"])
def test_a_failing_task_makes_the_command_fail_and_stops_the_chain(run_files: Path, executor: str) -> None:
    out = run_files / f"failing-{executor}"
    done = pipeline(run_files, executor, out, "sft:model.path=nowhere")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "sft: FAILED" in done.stdout
    assert "nowhere" in done.stdout  # the reason, from the run directory
    assert "rl: SUCCEEDED" not in done.stdout
    assert not (out / "rl").exists()
    assert not (out / "eval").exists()
    if executor == "slurm":
        assert "rl: CANCELLED" in done.stdout
        assert tool("squeue", "-h", "--account=r1reward").strip() == ""
