"""SFT jobs of 2 nodes x 2 ranks that are left alone, preempted, cut off, crashed, cancelled, and lose a node."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
from jobs import Job

from megatron_r1reward.monitor.run_state import ExitReport

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(2400)]
COMPARED = ("sft/loss", "grad_norm", "lr", "entropy")


def assert_same_training(job: Job, reference: Job, steps: int) -> None:
    expected, got = reference.rows(), job.rows()
    assert list(got) == list(expected) == list(range(1, steps + 1))
    for step, row in expected.items():
        for name in COMPARED:
            assert got[step][name] == pytest.approx(row[name], rel=1e-6), (step, name)


def life(job: Job, number: int) -> ExitReport:
    report = ExitReport.read(job.run.logs(number) / "exit.json")
    assert report is not None
    return report


@pytest.fixture(scope="module")
def undisturbed(running: dict[str, Future[Any]]) -> Job:
    return running["reference"].result()[0]


@pytest.mark.scenario("reference")
def test_two_jobs_on_one_node_finish_and_agree_also_in_a_container(ended: tuple[Job, Job]) -> None:
    first, second = ended
    for job in ended:
        assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), job.output()
        assert job.accounting() == {"job": "COMPLETED", "batch": "COMPLETED", "trainer": "COMPLETED"}
        assert (job.report().outcome, job.report().step, job.run.done.exists()) == ("done", 30, True)
        assert "trainer: 4 task(s) on n1,n2" in job.output()
    assert_same_training(second, first, 30)


@pytest.mark.scenario("reference")
def test_the_log_of_a_rank_says_which_rank_it_is(ended: tuple[Job, Job]) -> None:
    log = ended[0].run.log(0, "trainer").read_text(errors="replace")  # srun cuts progress bars within characters
    assert "0: " in log
    assert "finished" in log


@pytest.mark.scenario("preempted")
def test_usr1_saves_requeues_and_resumes_at_the_exact_step(ended: Job, undisturbed: Job) -> None:
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended.output()
    first = life(ended, 0)
    assert (first.outcome, first.code) == ("requeue", 75)
    assert first.saved_step == first.step
    assert first.step is not None and 3 <= first.step < 30
    assert_same_training(ended, undisturbed, 30)
    assert ended.accounting()["trainer"] == "COMPLETED"


@pytest.mark.scenario("out_of_time")
def test_the_time_limit_is_met_with_a_save_and_another_turn(ended: Job) -> None:
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended.output()
    first = life(ended, 0)
    assert (first.outcome, first.code) == ("requeue", 75)
    assert "time limit" in first.reason
    assert first.saved_step == first.step
    assert list(ended.rows()) == list(range(1, 101))


@pytest.mark.scenario("node_lost")
def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(ended: Job, undisturbed: Job) -> None:
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended.output()
    assert "after step" in ended.run.log(1, "trainer").read_text(errors="replace")
    assert_same_training(ended, undisturbed, 30)


@pytest.mark.scenario("crashed_in_a_chain")
def test_a_crashed_rank_ends_the_job_and_the_chain(ended: tuple[Job, Job]) -> None:
    parent, child = ended
    assert (parent.state, parent.exit_code) == ("FAILED", 139), parent.output()  # 128 + SIGSEGV
    report = parent.report()
    assert (report.outcome, report.code, report.component) == ("failed", 139, "trainer")
    assert "task 3" in report.reason
    last = parent.output().strip().splitlines()[-1]
    assert "failed: trainer: task 3" in last
    assert parent.accounting()["trainer"] in ("FAILED", "CANCELLED")
    assert child.state == "CANCELLED", "its dependency can never be satisfied"


@pytest.mark.scenario("cancelled")
def test_scancel_is_recorded(ended: Job) -> None:
    assert ended.state == "CANCELLED"
    report = ended.report()
    assert (report.outcome, report.code) == ("cancelled", 143)
    assert not ended.run.done.exists()
    assert ended.accounting()["job"] == "CANCELLED"


@pytest.mark.scenario("cancelled")
def test_no_process_and_no_job_is_left_behind(ended: Job, left_behind: str | None) -> None:
    assert left_behind is None
