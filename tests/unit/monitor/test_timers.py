import pytest

from megatron_r1reward.monitor.metrics import check_metrics
from megatron_r1reward.monitor.timers import PhaseTimer


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_nest_and_reset() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)
    with timer.phase("step"):
        for _ in range(2):
            with timer.phase("generate"):
                clock.now += 3.0
        clock.now += 1.0
    assert timer.seconds == {"generate": 6.0, "step": 7.0}
    assert check_metrics(timer.metrics()) == {"time/generate": 6.0, "time/step": 7.0}
    timer.reset()
    assert timer.seconds == {}


def test_a_phase_that_raises_is_counted_and_raises() -> None:
    clock = Clock()
    timer = PhaseTimer(clock)

    def fail() -> None:
        with timer.phase("push"):
            clock.now += 2.0
            raise RuntimeError("no server")

    with pytest.raises(RuntimeError, match="no server"):
        fail()
    assert timer.seconds == {"push": 2.0}
