"""The recipes through NeMo-Run, and slurm/judge.sh, whose server the RL stage there shares."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from jobs import is_listening, tool
from recipe_runs import LAUNCHER, Experiment, WithSharedJudge
from scenarios import Chain
from test_rl_jobs import assert_same_training

from megatron_r1reward.status.read import read_status

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not LAUNCHER.exists(), reason="no .venv-recipes: make recipes builds NeMo-Run's environment"),
]


def rows(out: Path, stage: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.scenario("nemo_slurm")
def test_every_stage_was_a_job_of_its_own(ended: WithSharedJudge) -> None:
    experiment = ended.experiment
    assert experiment.code == 0, experiment.text
    assert all(f"{stage}: SUCCEEDED" in experiment.text for stage in ("sft", "rl"))
    jobs = set()
    for stage in ("sft", "rl"):
        status = read_status(experiment.out / stage)
        assert status.state == "done"
        assert status.info is not None
        assert status.info.launcher == "slurm"
        jobs.add(status.info.job_id)
    assert len(jobs) == 2
    states = tool("sacct", "-n", "-X", "-P", "-j", ",".join(map(str, sorted(jobs))), "-o", "State").split()
    assert states == ["COMPLETED"] * 2
    assert [row["step"] for row in rows(experiment.out, "rl")] == [1, 2]


@pytest.mark.scenario("nemo_slurm")
def test_a_judge_job_is_shared_and_outlives_those_that_ask_it(ended: WithSharedJudge) -> None:
    answered = rows(ended.experiment.out, "rl")
    assert sum(row["judge/asked"] - row["judge/not_tried"] for row in answered) > 0, answered
    assert ended.judge_problem_afterwards is None


@pytest.mark.scenario("nemo_slurm")
def test_a_server_that_cannot_be_mended_is_named_as_the_cause(ended: WithSharedJudge) -> None:
    judge = ended.judge
    assert (judge.state, judge.exit_code) == ("FAILED", 137), judge.output()  # 128 + SIGKILL
    report = judge.report()
    assert (report.outcome, report.code, report.component) == ("failed", 137, "judge-0")
    assert "failed: judge-0" in judge.output().strip().splitlines()[-1]
    # Where the step ended for Slurm before its watcher saw it, the supervisor asks the node whether it is there.
    assert judge.accounting().keys() - {"probe"} == {"job", "batch", "judge-0"}
    assert not any(is_listening(address.url) for address in judge.run.addresses("judge"))


@pytest.mark.scenario("nemo_local")
def test_the_local_executor_gives_the_same_losses(ended: Experiment, running: dict[str, Future[Any]]) -> None:
    assert ended.code == 0, ended.text
    on_slurm: WithSharedJudge = running["nemo_slurm"].result()
    got, expected = rows(ended.out, "sft"), rows(on_slurm.experiment.out, "sft")
    assert [row["sft/loss"] for row in got] == pytest.approx([row["sft/loss"] for row in expected], rel=1e-6)
    chain: Chain = running["reference"].result()
    assert all(row["reward/consistency"] == 0 for row in chain.rl.rows().values()), "it has a judge"
    assert_same_training({int(row["step"]): row for row in rows(ended.out, "rl")}, chain.rl.rows())
    assert [read_status(ended.out / stage).state for stage in ("sft", "rl")] == ["done", "done"]


def assert_the_chain_stopped(experiment: Experiment) -> None:
    assert experiment.code == 1, experiment.text
    assert "sft: FAILED" in experiment.text
    assert "nowhere" in experiment.text  # the reason, from the run directory
    assert "rl: SUCCEEDED" not in experiment.text
    assert not (experiment.out / "rl").exists()
    assert not (experiment.out / "eval").exists()


@pytest.mark.scenario("nemo_slurm_fails")
def test_a_failing_task_makes_the_command_fail_and_cancels_the_chain(ended: Experiment) -> None:
    assert_the_chain_stopped(ended)
    assert "rl: CANCELLED" in ended.text


@pytest.mark.scenario("nemo_local_fails")
def test_a_failing_task_makes_the_command_fail_also_locally(ended: Experiment) -> None:
    assert_the_chain_stopped(ended)
