"""When: wall-clock seconds per phase of a step, when servers were busy, and a row per phase in a file, so that what
overlapped can be seen afterwards."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_r1reward.monitor.sinks import read_rows, truncate


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


class Timeline:
    """Rows `{"step": int, "phase": str, "start": float, "end": float}` in seconds since the epoch, in the order in
    which the phases ended; `step` is the one that the work was for, counted from 1. Methods may be called from any
    thread.

    Args:
        path: JSONL file; None: nothing is recorded. With `resumed_step` the rows of later steps are dropped, without it
            a new file begins.
    """

    def __init__(self, path: Path | None, *, resumed_step: int | None = None) -> None:
        self.step = 0  # of the rows that `add` gets without one
        self._epoch = time.time() - time.perf_counter()  # one clock for all threads that never jumps
        self._lock = threading.Lock()
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if resumed_step is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            truncate(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def add(self, phase: str, start: float, end: float, *, step: int | None = None) -> None:
        """A phase that ran from `start` to `end` by `time.perf_counter`."""
        row = {
            "step": self.step if step is None else step,
            "phase": phase,
            "start": round(self._epoch + start, 4),
            "end": round(self._epoch + end, 4),
        }
        with self._lock:
            if self._file is not None:
                self._file.write(json.dumps(row) + "\n")
                self._file.flush()

    @contextmanager
    def phase(self, name: str, *, step: int) -> Iterator[None]:
        """Record what runs inside, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, start, time.perf_counter(), step=step)

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def read_timeline(path: Path) -> list[dict[str, Any]]:
    """The rows of a timeline; none when there is no file. Raises ValueError on a line that is not a row."""
    return read_rows(path) if path.exists() else []
