"""Which share of a step servers, judge and trainer had nothing to do."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_r1reward.monitor.metrics import check_metrics
from megatron_r1reward.monitor.timers import BusyClock, PhaseTimer
from megatron_r1reward.training.rl import idle_shares


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def busy(times: Sequence[tuple[float, float]]) -> BusyClock:
    clock = Clock()
    server = BusyClock(clock)
    for start, end in times:
        clock.now = start
        with server.busy():
            clock.now = end
    return server


def test_shares_of_a_step() -> None:
    """Of 100 s: one server works 40, the other 20, one judge 10; the trainer waits 45."""
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("step"):
        with timer.phase("wait"):
            clock.now = 45.0
        clock.now = 100.0
    rows: list[tuple[str, float, float]] = []
    pool = SimpleNamespace(clocks={"rollout-0": busy([(0, 30), (90, 100)]), "rollout-1": busy([(0, 20)])})
    services = SimpleNamespace(pool=pool, scorer=SimpleNamespace(clocks={"judge-0": busy([(10, 15), (30, 35)])}))
    main: Any = SimpleNamespace(services=services, timeline=SimpleNamespace(add=lambda *row: rows.append(row)))
    shares = idle_shares(main, timer)
    assert shares == pytest.approx({"idle/trainer": 0.45, "idle/generation": 0.7, "idle/judge": 0.9})
    assert check_metrics(shares) == shares
    assert rows == [
        ("rollout-0", 0, 30), ("rollout-0", 90, 100), ("rollout-1", 0, 20), ("judge-0", 10, 15), ("judge-0", 30, 35),
    ]  # fmt: skip


def test_a_replay_has_a_trainer_only() -> None:
    timer = PhaseTimer(clock := Clock())
    with timer.phase("step"), timer.phase("wait"):
        clock.now = 2.0
    main: Any = SimpleNamespace(services=None)
    assert idle_shares(main, timer) == {"idle/trainer": 1.0}
