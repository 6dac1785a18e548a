"""RL jobs with real vLLM servers for rollout and judge, a trainer of 2 nodes x 2 ranks, and (fake) GPUs."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, is_listening

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]
COMPARED = ("loss", "grad_norm", "lr", "entropy", "reward/mean", "response/mean_tokens")
ALL_STEPS = {"rollout-0", "judge-0", "trainer"}


def assert_same_training(got: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    assert list(got) == list(expected) == [1, 2, 3]
    assert all(abs(row["loss"]) > 1e-6 and row["grad_norm"] > 1e-6 for row in expected.values()), "nothing is trained"
    for step, row in expected.items():
        for name in COMPARED:
            assert got[step][name] == pytest.approx(row[name], rel=1e-6), (step, name)


def assert_servers_are_gone(job: Job) -> None:
    for kind in ("rollout", "judge"):
        for address in job.run.addresses(kind):
            assert not is_listening(address.url), address


@pytest.fixture(scope="module")
def finished(running: dict[str, Future[Any]]) -> Job:
    return running["rl_finished"].result()


@pytest.mark.scenario("rl_finished")
def test_a_job_with_servers_finishes(ended: Job) -> None:
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.output()
    assert ended.report().outcome == "done"
    rewards = [row["reward/mean"] for row in ended.rows().values()]
    assert max(rewards) > 0.5, f"a right answer is worth at least 1: {rewards}"
    assert sum(row["judge/asked"] - row["judge/not_tried"] for row in ended.rows().values()) > 0
    states = ended.accounting()
    assert states.keys() == {"job", "batch", *ALL_STEPS}
    assert (states["job"], states["trainer"]) == ("COMPLETED", "COMPLETED")
    assert {address.component for address in ended.run.addresses("rollout")} == {"rollout-0"}
    assert_servers_are_gone(ended)


@pytest.mark.scenario("rl_finished")
def test_components_have_disjoint_gpus(ended: Job) -> None:
    where = {}
    for name in ("rollout-0", "judge-0"):
        log = ended.run.log(0, name).read_text()
        match = re.search(rf"{name} on (\S+), CUDA_VISIBLE_DEVICES=(\S+)", log)
        assert match is not None, log
        where[name] = (match[1], match[2])
    assert where["rollout-0"][0] == where["judge-0"][0], "both fit on the node that the trainer leaves free"
    assert {gpu for _, gpu in where.values()} == {"0", "1"}


@pytest.mark.scenario("rl_local")
def test_the_same_run_file_gives_the_same_losses_without_slurm(ended: Path, finished: Job) -> None:
    rows = {row["step"]: row for row in map(json.loads, (ended / "metrics.jsonl").read_text().splitlines())}
    assert_same_training(rows, finished.rows())


@pytest.mark.scenario("rl_heterogeneous")
def test_the_judge_may_be_in_another_group_of_a_heterogeneous_job(ended: Job, finished: Job) -> None:
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), ended.output()
    judge = ended.run.addresses("judge")[0]
    trainer = re.search(r"trainer: 4 task\(s\) on (\S+),", ended.output())
    assert trainer is not None
    assert judge.host not in trainer[1].split(",")
    assert_same_training(ended.rows(), finished.rows())
    assert_servers_are_gone(ended)


@pytest.mark.scenario("rl_server_does_not_start")
def test_a_server_that_does_not_start_fails_the_job_with_its_own_words(ended: Job) -> None:
    assert (ended.state, ended.exit_code) == ("FAILED", 2), ended.output()  # argparse's exit code, out of vLLM
    report = ended.report()
    assert (report.outcome, report.component) == ("failed", "rollout-0")
    assert "--no-such" in ended.output()
    assert "trainer" not in ended.accounting(), "the trainer has not been started"
    assert_servers_are_gone(ended)


@pytest.mark.scenario("rl_server_dies")
def test_a_server_that_dies_is_named_as_the_cause(ended: Job) -> None:
    assert (ended.state, ended.exit_code) == ("FAILED", 137), ended.output()  # 128 + SIGKILL
    report = ended.report()
    assert (report.outcome, report.code, report.component) == ("failed", 137, "judge-0")
    assert report.step is not None and report.step >= 1
    assert "failed: judge-0" in ended.output().strip().splitlines()[-1]
    # Where the step ended for Slurm before its watcher saw it, the supervisor asks the node whether it is there.
    assert ended.accounting().keys() - {"probe"} == {"job", "batch", *ALL_STEPS}
    assert_servers_are_gone(ended)
