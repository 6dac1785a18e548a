"""What ran when: one row per phase, so that what overlapped can be seen afterwards."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_r1reward.monitor.sinks import read_rows, truncate


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
