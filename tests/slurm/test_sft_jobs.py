"""SFT jobs that are left alone, preempted, cut off, crashed, cancelled, and lose a node."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest
import torch
from jobs import Job
from run_files import RESUMED_STEPS, SFT_STEPS
from safetensors.torch import load_file
from scenarios import Chain

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
COMPARED = ("sft/loss", "grad_norm", "lr", "entropy")


def assert_same_training(job: Job, reference: Job, *, at_least: int) -> None:
    """Every step of a job with several lives, as far as the reference goes."""
    expected, got = reference.rows(), job.rows()
    assert list(expected) == list(range(1, SFT_STEPS + 1))
    assert list(got) == list(range(1, len(got) + 1)), "steps are missing or were taken twice"
    assert at_least <= len(got)
    for step in list(got)[:SFT_STEPS]:
        for name in COMPARED:
            assert got[step][name] == pytest.approx(expected[step][name], rel=1e-6), (step, name)


@pytest.fixture(scope="module")
def undisturbed(running: dict[str, Future[Any]]) -> Job:
    return running["reference"].result().sft


@pytest.mark.scenario("reference")
def test_a_job_that_is_left_alone_finishes(ended: Chain) -> None:
    job = ended.sft
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), job.output()
    assert job.accounting() == {"job": "COMPLETED", "batch": "COMPLETED", "trainer": "COMPLETED"}
    assert (job.report().outcome, job.report().step, job.run.done.exists()) == ("done", SFT_STEPS, True)
    assert "trainer: 2 task(s) on n1,n2" in job.output()
    log = job.run.log(0, "trainer").read_text(errors="replace")  # srun cuts progress bars within characters
    assert "0: " in log, "a line says which rank wrote it"


@pytest.mark.scenario("reference")
def test_a_conversion_job_exports_the_same_weights(ended: Chain) -> None:
    assert (ended.conversion.state, ended.conversion.exit_code) == ("COMPLETED", 0), ended.conversion.output()
    got, expected = (
        load_file(folder / "model.safetensors") for folder in (ended.conversion.run.root, ended.sft.run.root / "hf")
    )
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.scenario("preempted_out_of_time_then_cancelled")
def test_usr1_saves_requeues_and_resumes_at_the_exact_step_also_in_a_container(ended: Job, undisturbed: Job) -> None:
    first = ended.life(0)
    assert (first.outcome, first.code) == ("requeue", 75)
    assert first.saved_step == first.step
    assert first.step is not None and 3 <= first.step < SFT_STEPS - 4, "the next life is compared, too"
    assert_same_training(ended, undisturbed, at_least=first.step + 2)


@pytest.mark.scenario("preempted_out_of_time_then_cancelled")
def test_two_jobs_on_the_same_nodes_do_not_disturb_each_other(ended: Job, undisturbed: Job) -> None:
    (start, end, nodes), (other_start, other_end, other_nodes) = ended.lives()[0], undisturbed.lives()[0]
    assert nodes == other_nodes == "n[1-2]"
    assert max(start, other_start) < min(end, other_end), "they ran at the same time"
    assert_same_training(ended, undisturbed, at_least=3)


@pytest.mark.scenario("preempted_out_of_time_then_cancelled")
def test_the_time_limit_is_met_with_a_save_and_another_turn(ended: Job, undisturbed: Job) -> None:
    assert ended.restarts == 2, ended.output()
    first, second = ended.life(0), ended.life(1)
    assert (second.outcome, second.code) == ("requeue", 75)
    assert "the time limit is" in second.reason
    assert second.saved_step == second.step
    assert first.step is not None and second.step is not None
    assert first.step + 2 <= second.step < SFT_STEPS - 2, "the last life is compared, too"
    assert_same_training(ended, undisturbed, at_least=second.step + 2)


@pytest.mark.scenario("preempted_out_of_time_then_cancelled")
def test_scancel_is_recorded(ended: Job) -> None:
    assert ended.state == "CANCELLED", ended.output()
    report = ended.report()
    assert (report.outcome, report.code, report.life) == ("cancelled", 143, 2)
    assert not ended.run.done.exists()
    assert ended.accounting()["job"] == "CANCELLED"


@pytest.mark.scenario("node_lost")
def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(ended: Job, undisturbed: Job) -> None:
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 1), ended.output()
    assert "after step" in ended.run.log(1, "trainer").read_text(errors="replace")
    assert len(ended.rows()) == RESUMED_STEPS
    assert_same_training(ended, undisturbed, at_least=RESUMED_STEPS)


@pytest.mark.scenario("crashed_in_a_chain")
def test_a_crashed_rank_ends_the_job_and_the_chain(ended: tuple[Job, Job]) -> None:
    parent, child = ended
    assert (parent.state, parent.exit_code) == ("FAILED", 139), parent.output()  # 128 + SIGSEGV
    report = parent.report()
    assert (report.outcome, report.code, report.component) == ("failed", 139, "trainer")
    assert "task 1" in report.reason
    last = parent.output().strip().splitlines()[-1]
    assert "failed: trainer: task 1" in last
    assert parent.accounting()["trainer"] in ("FAILED", "CANCELLED")
    assert child.state == "CANCELLED", "its dependency can never be satisfied"
