"""When a step warns, and what it says."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from megatron_r1reward.algorithm.advantages import normalize_and_filter
from megatron_r1reward.config.schema import AlgorithmSection, HealthSection
from megatron_r1reward.training import alarms
from megatron_r1reward.training.rl_metrics import balance

FINE = {
    "mismatch/mean_abs": 0.02, "mismatch/kl": 0.001, "mismatch/share_beyond": 0.0, "staleness/max": 0,
    "update/skipped": 0, "judge/asked": 4, "judge/unknown": 1, "rollout/failed": 0,
}  # fmt: skip


def warnings(caplog: pytest.LogCaptureFixture, **changed: float) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        alarms.check(FINE | {name.replace("__", "/"): value for name, value in changed.items()}, AlgorithmSection(), 7)
    return caplog.text


def test_a_healthy_step_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings(caplog) == ""


@pytest.mark.parametrize(
    "changed",
    [{"mismatch__mean_abs": 0.2}, {"mismatch__mean_abs": math.nan}, {"mismatch__share_beyond": 0.05}],
)
def test_a_gap_warns_with_its_numbers(caplog: pytest.LogCaptureFixture, changed: dict[str, float]) -> None:
    text = warnings(caplog, **changed)
    assert "step 7: rollout servers and trainer disagree" in text
    assert "check that both use the same precision" in text


def test_a_gap_of_old_samples_names_their_age(caplog: pytest.LogCaptureFixture) -> None:
    assert "up to 2 steps old: lower optimizer.lr" in warnings(caplog, mismatch__mean_abs=0.2, staleness__max=2)


LEARNING = {
    "rollout/unparsable_fraction": 0.02, "rollout/answer_1_fraction": 0.5, "response/truncated_fraction": 0.01,
    "entropy": 0.3, "reward/result": 0.7, "advantage/std": 0.6, "advantage/filtered_negative": 0.0,
    "advantage/filtered_positive": 0.0, "advantage/negative_kept": 0.3, "advantage/positive_kept": 0.7,
    "advantage/balance": 0.0, "grad_norm": 0.4,
}  # fmt: skip
CAUSES = {
    "unparsable": ({"rollout/unparsable_fraction": 1.0}, "hold no answer: train the format in SFT"),
    "same answer, 1": ({"rollout/answer_1_fraction": 1.0}, "nearly all are the same: keep data.swap='random'"),
    "same answer, 2": ({"rollout/answer_1_fraction": 0.0}, "0.0 % of the answers are 1"),
    "same rating": ({"rating/commonest_fraction": 0.99}, "99.0 % of the ratings are the same number"),
    "cut off": ({"response/truncated_fraction": 0.99}, "cut off: raise sampling.max_tokens"),
    "entropy": ({"entropy": 0.0}, "raise algorithm.entropy_coefficient"),
    "entropy is no number": ({"entropy": math.nan}, "entropy is nan"),
    "no spread": ({"advantage/std": 1e-4}, "nothing to compare; use rows"),
    "negative evidence": (
        {"advantage/filtered_negative": 0.05, "advantage/negative_kept": 0.0},
        "removed all negative evidence (5.0 % of the tokens) at 70.0 % right",
    ),
    "positive evidence": (
        {"advantage/filtered_positive": 0.05, "advantage/positive_kept": 0.0},
        "removed all positive evidence (5.0 % of the tokens)",
    ),
    "one-sided, positive": (
        {"advantage/balance": 0.92, "advantage/filtered_negative": 0.05},
        "96.0 % of the evidence is positive at 70.0 % right (health.one_sided_share 0.95)",
    ),
    "one-sided, negative": ({"advantage/balance": -0.92}, "96.0 % of the evidence is negative"),
    "no gradient": ({"grad_norm": 0.0}, "the gradient is exactly 0"),
}


def test_a_step_that_learns_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    health = alarms.Health(HealthSection(policy="stop", patience=1), AlgorithmSection())
    with caplog.at_level(logging.WARNING):
        assert health.check(LEARNING, 1) is None
    assert caplog.text == ""


def test_what_was_not_measured_is_no_cause() -> None:
    unmeasured = {name: value for name, value in LEARNING.items() if name != "entropy"}
    assert alarms.Health(HealthSection(policy="stop", patience=1), AlgorithmSection()).check(unmeasured, 1) is None


@pytest.mark.parametrize("cause", CAUSES)
def test_a_signal_that_is_gone_is_said_with_what_to_change(cause: str, caplog: pytest.LogCaptureFixture) -> None:
    changed, text = CAUSES[cause]
    health = alarms.Health(HealthSection(patience=3), AlgorithmSection())
    with caplog.at_level(logging.WARNING):
        assert [health.check(LEARNING | changed, step) for step in range(1, 8)] == [None] * 7
    assert text in caplog.text
    assert [record.getMessage()[:7] for record in caplog.records] == ["step 1:", "step 3:", "step 6:"]


@pytest.mark.parametrize("cause", CAUSES)
def test_the_policy_stops_when_it_lasts(cause: str) -> None:
    changed, text = CAUSES[cause]
    health = alarms.Health(HealthSection(policy="stop", patience=3), AlgorithmSection(), speaks=False)
    steps: list[dict[str, float]] = [changed, changed, {}, changed, changed, changed]  # one that learns ends the count
    reasons = [health.check(LEARNING | step, number) for number, step in enumerate(steps)]
    assert reasons[:5] == [None] * 5
    assert reasons[5] is not None
    assert reasons[5].startswith("there has been nothing to learn from for 3 steps: ")
    assert text in reasons[5]


@pytest.mark.parametrize("cause", CAUSES)
def test_a_rollback_is_told_where_it_began(cause: str) -> None:
    health = alarms.Health(HealthSection(policy="rollback", patience=3), AlgorithmSection(), speaks=False)
    steps: list[dict[str, float]] = [CAUSES[cause][0], {}, *[CAUSES[cause][0]] * 3]
    reasons = [health.check(LEARNING | step, number) for number, step in enumerate(steps, start=1)]
    assert reasons[:4] == [None] * 4
    assert health.began == 3
    assert reasons[4] is not None
    assert CAUSES[cause][1] in reasons[4]
    assert "health.policy" not in reasons[4], "the run goes on"


def test_the_papers_filter_above_90_percent_is_provoked_from_rewards() -> None:
    """From rewards to the alarm: 19 of 20 right; at 17 of 20 the wrong ones still train."""
    found = {}
    for right in (17, 19):
        returns = torch.tensor([2.0] * right + [0.5] * (20 - right))
        result = normalize_and_filter(returns, AlgorithmSection())
        wrong = returns < result.mean
        metrics = LEARNING | {
            "advantage/std": result.std,
            "advantage/filtered_negative": float((result.filtered_mask & wrong).float().mean()),
            "advantage/negative_kept": float((result.advantages < 0).float().mean()),
            "advantage/positive_kept": float((result.advantages > 0).float().mean()),
        }
        health = alarms.Health(HealthSection(policy="stop", patience=1), AlgorithmSection())
        found[right] = health.check(metrics, 1)
    assert found[17] is None
    assert found[19] is not None
    assert "all negative evidence" in found[19]


def test_evidence_is_one_sided_where_the_filter_starves_it_and_not_by_accuracy_alone() -> None:
    """From rewards to the alarm: ten of 256 wrong, and a right one that is not consistent, which the filter leaves."""
    returns = torch.tensor([2.0] * 245 + [1.5] + [0.5] * 10)
    found = {}
    for rule in ("paper", "none"):
        algorithm = AlgorithmSection(filter=rule)
        result = normalize_and_filter(returns, algorithm)
        signed = result.advantages
        metrics = LEARNING | {
            "reward/result": 246 / 256,
            "advantage/balance": balance(float(signed.clamp(min=0).sum()), float(-signed.clamp(max=0).sum())),
        }
        found[rule] = alarms.Health(HealthSection(policy="stop", patience=1), algorithm).check(metrics, 1)
    assert found["paper"] is not None
    assert "% of the evidence is positive at 96.1 % right" in found["paper"]
    assert found["none"] is None, "where nothing is filtered both signs weigh the same"
    assert balance(0.0, 0.0) == 0.0


def following(rollouts: int, **section: object) -> alarms.Health:
    health = HealthSection.model_validate({"policy": "stop", "patience": 3} | section)
    return alarms.Health(health, AlgorithmSection(), rollouts=rollouts, speaks=False)


def test_a_policy_that_gets_worse_is_stopped() -> None:
    """A collapse in which every response still parses and samples still differ: only fewer of them are right."""
    health = following(128)
    right = [0.86, 0.90, 0.88, 0.78, 0.50, 0.51, 0.49]
    reasons = [health.check(LEARNING | {"reward/result": share}, step) for step, share in enumerate(right, start=1)]
    assert reasons[:6] == [None] * 6
    assert reasons[6] is not None
    assert reasons[6].startswith("the policy has got worse for 3 steps: 49.0 % of the samples are right, 90.0 % were")
    assert health.began == 5


@pytest.mark.parametrize(
    ("rollouts", "section", "low"),
    [(128, {}, 0.55), (16, {}, 0.40), (128, {"max_fall": 0.3}, 0.42), (0, {}, 0.1)],
    ids=["noise", "noise of few", "allowed", "a curriculum, whose rows get harder"],
)
def test_noise_is_no_fall(rollouts: int, section: dict[str, object], low: float) -> None:
    health = following(rollouts, **section)
    right = [0.66, 0.70, 0.68, *[low] * 6]
    assert not any(health.check(LEARNING | {"reward/result": share}, step) for step, share in enumerate(right))


def test_draws_of_one_policy_are_no_fall() -> None:
    """A thousand runs of a hundred steps of 64 samples of which 66 % are right: the luckiest step is far above."""
    generator = torch.Generator().manual_seed(0)
    counts, share = torch.full((1000, 100), 64.0), torch.full((1000, 100), 0.66)
    draws = torch.binomial(counts, share, generator=generator) / 64
    for run in draws.tolist():
        health = following(64, patience=5)
        assert not any(health.check(LEARNING | {"reward/result": share}, step) for step, share in enumerate(run))
