"""RL jobs with real vLLM servers for rollout and judge, a trainer of 2 nodes x 2 ranks, and (fake) GPUs."""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from jobs import Job, is_listening
from safetensors.torch import load_file
from scenarios import Chain, Colocated, Service

from megatron_r1reward.training.resume import describe_data

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]
COMPARED = ("loss", "grad_norm", "lr", "entropy", "reward/mean", "response/mean_tokens")
ALL_STEPS = {"rollout-0", "judge-0", "trainer"}


def assert_same_training(got: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    """The three steps of `expected`, whatever comes after them."""
    assert list(expected) == list(got)[:3] == [1, 2, 3]
    assert all(abs(row["loss"]) > 1e-6 and row["grad_norm"] > 1e-6 for row in expected.values()), "nothing is trained"
    for step, row in expected.items():
        for name in COMPARED:
            assert got[step][name] == pytest.approx(row[name], rel=1e-6), (step, name)


def assert_servers_are_gone(job: Job) -> None:
    for kind in ("rollout", "judge"):
        for address in job.run.addresses(kind):
            assert not is_listening(address.url), address


def node_and_gpu(job: Job, name: str) -> tuple[str, str]:
    """What the server's log says."""
    log = job.run.log(0, name).read_text()
    match = re.search(rf"{name} on (\S+), CUDA_VISIBLE_DEVICES=(\S+)", log)
    assert match is not None, log
    return match[1], match[2]


@pytest.fixture(scope="module")
def chain(running: dict[str, Future[Any]]) -> Chain:
    return running["reference"].result()


@pytest.fixture(scope="module")
def finished(chain: Chain) -> Job:
    return chain.rl


@pytest.mark.scenario("reference")
def test_a_job_selects_the_hard_samples(chain: Chain) -> None:
    job = chain.selection
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.output()
    assert (job.report().outcome, job.report().code) == ("done", 0)
    assert job.accounting().keys() == {"job", "batch", "rollout-0", "annotate"}
    assert (job.accounting()["job"], job.accounting()["annotate"]) == ("COMPLETED", "COMPLETED")
    assert job.lives()[0][0] >= chain.sft.lives()[0][1], "it starts when the cold start has ended"
    rows = [json.loads(line) for line in (job.run.root / "attempts.jsonl").read_text().splitlines()]
    attempts = {row["preference_id"]: row for row in rows}.values()  # a row per attempt, the last one holds all
    assert len(attempts) == 24, "annotate.max_rows"
    hard = json.loads((job.run.root / "hard.json").read_text())
    solved_late = sorted(record["preference_id"] for record in attempts if not record["attempts"][0])
    assert sorted(entry["id"] for entry in hard) == solved_late
    assert 0 < len(hard) < 24, "the cold-started model is right on some"
    assert_servers_are_gone(job)


@pytest.mark.scenario("reference")
def test_the_rl_job_trains_on_what_was_selected(chain: Chain) -> None:
    assert chain.rl.lives()[0][0] >= chain.selection.lives()[0][1], "it starts when the selection has ended"
    hard = json.loads((chain.selection.run.root / "hard.json").read_text())
    saved = json.loads((chain.rl.run.root / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert saved["data"] == describe_data({row["id"]: row["content"] for row in hard}, seed=0, batch_size=8)


@pytest.mark.scenario("reference")
def test_a_job_with_servers_finishes(finished: Job) -> None:
    assert (finished.state, finished.exit_code) == ("COMPLETED", 0), finished.output()
    assert finished.report().outcome == "done"
    rewards = [row["reward/mean"] for row in finished.rows().values()]
    assert max(rewards) > 0.5, f"a right answer is worth at least 1: {rewards}"
    assert sum(row["judge/asked"] - row["judge/not_tried"] for row in finished.rows().values()) > 0
    states = finished.accounting()
    assert states.keys() == {"job", "batch", *ALL_STEPS}
    assert (states["job"], states["trainer"]) == ("COMPLETED", "COMPLETED")
    assert {address.component for address in finished.run.addresses("rollout")} == {"rollout-0"}
    assert_servers_are_gone(finished)


@pytest.mark.scenario("reference")
def test_components_have_disjoint_gpus(finished: Job) -> None:
    where = {name: node_and_gpu(finished, name) for name in ("rollout-0", "judge-0")}
    assert where["rollout-0"][0] == where["judge-0"][0], "both fit on the node that the trainer leaves free"
    assert len({gpu for _, gpu in where.values()}) == 2  # not 0 and 1 where another job has one of them
    assert all(gpu.isdecimal() for _, gpu in where.values()), where


@pytest.mark.scenario("reference")
def test_the_evaluation_at_the_end_of_the_chain_asks_the_trained_model(chain: Chain) -> None:
    job = chain.evaluation
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.output()
    assert job.accounting().keys() == {"job", "batch", "rollout-0", "evaluate"}
    assert job.lives()[0][0] >= chain.rl.lives()[0][1], "it starts when RL has ended"
    before, after = chain.sft.run.root / "hf", chain.rl.run.root / "hf"
    assert str(after) in job.run.log(0, "rollout-0.vllm").read_text()
    weights, trained = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert any(not torch.equal(weights[name], tensor) for name, tensor in trained.items()), "RL has trained"
    result = json.loads((job.run.root / "evaluation.json").read_text())
    assert result["counts"]["pairs"] == 2
    assert result["format_rate"] == 1.0, "the model in which all began cannot do that"
    assert_servers_are_gone(job)


@pytest.mark.scenario("served_and_drained")
def test_a_service_is_found_asked_and_drained(ended: Service) -> None:
    """What it was asked when the job was told to end is answered; then nothing of it is left."""
    job = ended.job
    assert (ended.ready, ended.without_token) == (200, 401), job.output()
    (status, late), compared = ended.in_progress, ended.compared
    assert status == 200, late
    for answer, judgements in ((compared, 2), (late, 32)):
        assert len(answer["judgements"]) == answer["first"] + answer["second"] + answer["unparsable"] == judgements
        assert {one["order"] for one in answer["judgements"]} == {"12", "21"}
    assert compared["unparsable"] == 0, compared
    report = job.report()
    assert (report.outcome, report.code) == ("cancelled", 143), job.output()
    assert "told to end by SIGTERM" in report.reason
    assert job.accounting().keys() == {"job", "batch", "rollout-0", "serve"}
    assert not job.run.address("serve").exists(), "nobody shall take it for a service"
    assert not is_listening(ended.url)
    assert_servers_are_gone(job)


@pytest.mark.scenario("rl_servers_hang_and_die")
def test_the_judge_may_be_in_another_group_of_a_heterogeneous_job(ended: Colocated, finished: Job) -> None:
    judge = ended.job.run.addresses("judge")[0]
    trainer = re.search(r"trainer: 4 task\(s\) on (\S+),", ended.job.output())
    assert trainer is not None
    assert judge.host not in trainer[1].split(",")
    assert ended.job.rows()[3]["servers/restarts"] == 0
    assert_same_training(ended.job.rows(), finished.rows())


@pytest.mark.scenario("rl_servers_hang_and_die")
def test_a_colocated_server_sleeps_on_the_gpus_of_the_trainer(ended: Colocated, finished: Job) -> None:
    assert len({node for node, _ in ended.trainer}) == 2
    node, gpu = node_and_gpu(ended.job, "rollout-0")
    assert ended.rollout == {(node, gpu)}
    ranks = dict(ended.trainer)[node].split(",")  # not 0 and 1 where another job has one of them
    assert len(ranks) == 2 and gpu == ranks[0]
    assert node_and_gpu(ended.job, "judge-0")[0] not in {node for node, _ in ended.trainer}
    log = ended.job.run.log(0, "trainer").read_text(errors="replace")
    assert log.count("servers are asleep") >= 3, "in every step"
    assert all(ended.job.rows()[step]["servers/free_asleep_gb"] > 0 for step in (1, 2, 3))
    assert not any("servers/free_asleep_gb" in row for row in finished.rows().values())


@pytest.mark.scenario("rl_servers_hang_and_die")
def test_servers_that_hang_or_die_are_started_again_and_the_training_goes_on(ended: Colocated) -> None:
    job, rows = ended.job, ended.job.rows()
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.output()
    assert list(rows) == [1, 2, 3, 4, 5, 6]
    assert all(row["rollout/failed"] == 0 and row["mismatch/max_abs"] < 1e-3 for row in rows.values())
    assert (rows[6]["servers/restarts"], job.started("rollout-0"), job.started("judge-0")) == (2, 2, 1)
    assert_servers_are_gone(job)


@pytest.mark.scenario("rl_server_does_not_start")
def test_a_server_that_does_not_start_fails_the_job_with_its_own_words(ended: Job) -> None:
    assert (ended.state, ended.exit_code) == ("FAILED", 2), ended.output()  # argparse's exit code, out of vLLM
    report = ended.report()
    assert (report.outcome, report.component) == ("failed", "rollout-0")
    assert "--no-such" in ended.output()
    assert "trainer" not in ended.accounting(), "the trainer has not been started"
    assert_servers_are_gone(ended)
