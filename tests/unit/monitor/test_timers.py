import pytest

from megatron_r1reward.monitor.metrics import check_metrics
from megatron_r1reward.monitor.timers import BusyClock, PhaseTimer


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


def test_a_server_is_busy_while_it_has_anything_to_do() -> None:
    """Overlapping requests are one busy time; what is under way at the end of a step goes on in the next."""
    clock = Clock()
    server = BusyClock(clock)
    first, second = server.busy(), server.busy()
    first.__enter__()
    clock.now = 2.0
    second.__enter__()
    clock.now = 3.0
    first.__exit__(None, None, None)
    clock.now = 5.0
    second.__exit__(None, None, None)
    clock.now = 8.0
    with server.busy():
        clock.now = 10.0
        assert server.take(1.0, 10.0) == [(1.0, 5.0), (8.0, 10.0)]
        clock.now = 11.0
    assert server.take(10.0, 20.0) == [(10.0, 11.0)]
    assert server.take(20.0, 30.0) == []
