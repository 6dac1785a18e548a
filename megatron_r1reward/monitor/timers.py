"""Wall-clock seconds per phase of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up wall seconds per phase name; the same phase may run several times, phases may nest.

        timer = PhaseTimer()
        with timer.phase("generate"):
            ...
        monitor.log(step, timer.metrics())  # {"time/generate": ...}

    A phase that raises is counted too: its time was spent.

    Args:
        on_phase: gets (name, start, end) of every phase by `clock`, e.g. `Timeline.add`.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        *,
        on_phase: Callable[[str, float, float], None] | None = None,
    ) -> None:
        self._clock = clock
        self._on_phase = on_phase
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            end = self._clock()
            self._seconds[name] = self._seconds.get(name, 0.0) + end - start
            if self._on_phase is not None:
                self._on_phase(name, start, end)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds so far by phase, in the order in which the phases first ended."""
        return dict(self._seconds)

    def metrics(self) -> dict[str, float]:
        """`seconds` under the metric names `time/<phase>`."""
        return {f"time/{name}": seconds for name, seconds in self._seconds.items()}

    def reset(self) -> None:
        """Forget everything: call it at the start of a step."""
        self._seconds.clear()
