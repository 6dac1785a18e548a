"""A run's state from its files: every way to be alive, to wait and to end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1reward.run_dir import Address, Component, ExitReport, Heartbeat, RunDir, RunInfo, duration
from megatron_r1reward.status.read import last_rows, read_status

NOW = 1_000_000.0
INFO = RunInfo(
    stage="rl",
    life=0,
    launcher="local",
    host=socket.gethostname(),
    pid=os.getpid(),
    started=NOW - 600,
    ends=None,
    components=(Component(name="trainer", nodes=("n1", "n2"), tasks=4, gpus_per_node=2),),
)
BEAT = Heartbeat(
    component="trainer",
    host=socket.gethostname(),
    pid=os.getpid(),
    time=NOW - 3,
    phase="training",
    step=37,
    total_steps=60,
    first_step=0,
    longest_step_s=12.0,
    longest_save_s=5.0,
    saved_step=30,
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(root=tmp_path)


def write(run: RunDir, info: RunInfo | None = INFO, beat: Heartbeat | None = BEAT) -> None:
    if info is not None:
        info.write(run.run_info)
        run.logs(info.life).mkdir(exist_ok=True)
    if beat is not None:
        beat.write(run.heartbeat)


def write_metrics(run: RunDir, steps: range, seconds: float, *, pause_before: int | None = None) -> None:
    moment = NOW - seconds * len(steps)
    lines = []
    for step in steps:
        moment += seconds + (3600 if step == pause_before else 0)
        lines.append(json.dumps({"step": step, "time": moment, "reward/mean": 1.25, "lr": None, "other": 1.0}))
    (run.root / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9')  # the last line is torn


def end(run: RunDir, outcome: str, *, life: int = 0, **fields) -> ExitReport:
    codes = {"done": 0, "requeue": 75, "failed": 13, "cancelled": 143}
    report = ExitReport(
        outcome=outcome, code=codes[outcome], reason=f"because {outcome}", life=life, time=NOW, step=37, **fields
    )
    report.write(run.life_report(life))
    report.write(run.exit_report)
    return report


def test_a_running_stage(run):
    write(run)
    write_metrics(run, range(1, 38), 10.0, pause_before=30)
    address = Address(component="rollout-0", url="http://n3:1", served_name="policy", host="n3", ready_at=NOW)
    address.write(run.address("rollout-0"))
    status = read_status(run.root, now=NOW)
    assert status.state == "running"
    assert (status.step, status.total_steps, status.saved_step) == (37, 60, 30)
    assert status.seconds_per_step == pytest.approx(10.0)  # the pause between two lives does not count
    assert status.eta_s == pytest.approx(230.0)
    assert status.metrics == {"reward/mean": 1.25}
    assert [server.component for server in status.servers] == ["rollout-0"]
    assert status.why is None


def test_starting_and_silent(run):
    write(run, beat=None)
    assert read_status(run.root, now=NOW).state == "starting"
    assert read_status(run.root, now=NOW + 7200).state == "silent"
    write(run, beat=replace(BEAT, phase="loading", step=0))
    write_metrics(run, range(1, 31), 10.0)
    status = read_status(run.root, now=NOW)
    assert (status.state, status.step) == ("starting", 30)  # a resumed trainer that still loads
    write(run)
    assert read_status(run.root, now=NOW + 250).state == "running"
    assert read_status(run.root, now=NOW + 400).state == "silent"
    slow = replace(BEAT, longest_step_s=100.0)
    write(run, beat=slow)
    assert read_status(run.root, now=NOW + 400).state == "running"  # its steps take that long


@pytest.mark.parametrize("stage", ["judge", "eval"])
def test_a_stage_without_a_trainer_runs_once_its_servers_are_ready(run, stage):
    server = Component(name="judge-0", nodes=("n1",), tasks=1, gpus_per_node=1)
    write(run, info=replace(INFO, stage=stage, components=(server,)), beat=None)
    assert read_status(run.root, now=NOW).state == "starting"
    address = Address(component="judge-0", url="http://n1:1", served_name="judge", host="n1", ready_at=NOW)
    address.write(run.address("judge-0"))
    assert read_status(run.root, now=NOW + 1e6).state == "running"


def test_a_supervisor_that_was_killed(run):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write(run, info=replace(INFO, pid=child.pid))
    run.log(0, "trainer").write_text("loading\r 50%\r100%\nTraceback\nOSError: disk full\n")
    status = read_status(run.root, now=NOW)
    assert status.state == "died"
    assert status.log == "logs-0/trainer.log"
    assert status.log_tail == ("100%", "Traceback", "OSError: disk full")
    write(run, info=replace(INFO, pid=child.pid, host="elsewhere"))
    assert read_status(run.root, now=NOW).state == "running"  # nobody here can know better


@pytest.mark.parametrize(
    ("outcome", "state"), [("requeue", "waiting"), ("failed", "failed"), ("cancelled", "cancelled"), ("done", "done")]
)
def test_an_ended_life(run, outcome, state):
    write(run)
    report = end(run, outcome, component="trainer", log="logs-0/trainer.log", log_tail=("a", "b"))
    status = read_status(run.root, now=NOW)
    assert status.state == state
    assert status.why == report


def test_the_next_life_after_a_requeue(run):
    end(run, "requeue")
    write(run, info=replace(INFO, life=1, slurm_restarts=1))
    status = read_status(run.root, now=NOW)
    assert status.state == "running"
    assert status.why is None
    assert [life.outcome for life in status.lives] == ["requeue"]


def test_done_and_empty(run):
    assert read_status(run.root).state == "unknown"
    (run.root / "DONE").write_text("{}")
    assert read_status(run.root).state == "done"


@pytest.mark.parametrize(
    ("answer", "state"),
    [("echo RUNNING", "running"), ("echo PENDING", "waiting"), ("echo FAILED", "died"), ("exit 1", "running"),
     ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "died")],
)  # fmt: skip
def test_what_slurm_says(run, tmp_path, monkeypatch, answer, state):
    tool = tmp_path / "bin" / "squeue"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\n{answer}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    write(run, info=replace(INFO, launcher="slurm", job_id="7", host="n1"))
    assert read_status(run.root, now=NOW).state == state


def test_only_the_end_of_a_long_metrics_file_is_read(run):
    path = run.root / "metrics.jsonl"
    padding = "x" * 1000
    path.write_text("".join(json.dumps({"step": step, "pad": padding}) + "\n" for step in range(1000)))
    rows = last_rows(path)
    assert rows[-1]["step"] == 999
    assert 200 < len(rows) < 300


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (700, "11 min"), (12_000, "3 h 20 min"), (2e5, "2 d 7 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "megatron_r1reward.cli", "status", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_command(run):
    write(run, info=replace(INFO, started=time.time()), beat=replace(BEAT, time=time.time()))
    done = command(str(run.root))
    assert done.returncode == 0
    assert "running" in done.stdout
    assert "step 37 of 60 (62 %)" in done.stdout
    tree = json.loads(command(str(run.root), "--json").stdout)
    assert (tree["state"], tree["step"], tree["info"]["stage"]) == ("running", 37, "rl")
    end(run, "failed", component="rollout-0", log="logs-0/rollout-0.log", log_tail=("CUDA out of memory",))
    done = command(str(run.root))
    assert done.returncode == 1
    assert "because failed" in done.stdout
    assert "CUDA out of memory" in done.stdout
    assert command(str(run.root / "none")).returncode == 2
