"""When a step warns, and what it says."""

from __future__ import annotations

import logging
import math

import pytest

from megatron_r1reward.config.schema import AlgorithmSection
from megatron_r1reward.training import alarms

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
