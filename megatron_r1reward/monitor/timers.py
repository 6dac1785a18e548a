"""Wall-clock seconds per phase of a step, and when servers were busy."""

from __future__ import annotations

import threading
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
        self.spans: dict[str, tuple[float, float]] = {}  # (start, end) of each phase, the last time that it ran

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            end = self._clock()
            self._seconds[name] = self._seconds.get(name, 0.0) + end - start
            self.spans[name] = start, end
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
        self.spans.clear()


class BusyClock:
    """When something had at least one thing to do. Methods may be called from any thread.

    Args:
        clock: seconds, e.g. `time.perf_counter`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running = 0
        self._since = 0.0  # when the first of those that run began
        self._intervals: list[tuple[float, float]] = []

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Busy while this runs."""
        with self._lock:
            if self._running == 0:
                self._since = self._clock()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._intervals.append((self._since, self._clock()))

    def take(self, start: float, end: float) -> list[tuple[float, float]]:
        """The busy times between `start` and `end`; what was before `end` is forgotten."""
        with self._lock:
            found = [*self._intervals, *([(self._since, end)] if self._running else [])]
            self._intervals = [interval for interval in self._intervals if interval[1] > end]
        return [(max(a, start), min(b, end)) for a, b in found if b > start and a < end]
