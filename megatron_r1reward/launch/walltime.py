"""When to save so that the work survives the time limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_r1reward.run_dir import Heartbeat

log = logging.getLogger(__name__)
_READ_INTERVAL_S = 20.0
_SAFETY = 1.2  # the next step and the save may be slower than the slowest seen


@dataclass(frozen=True, kw_only=True)
class WalltimeGuard:
    """Anchored to the job's own end, which counts from the job's start: queueing, container start and server start have
    used up their part of it already.

    Attributes:
        ends: when Slurm ends the job, in seconds since the epoch; None without a limit.
        margin_s: kept free after the save, for ending the steps.
        grace_s: what ending the steps may take.
    """

    ends: float | None
    margin_s: float
    grace_s: float

    def latest_stop(self, heartbeat: Heartbeat | None) -> float | None:
        """Time at which the trainer must be asked to stop: one more step (begun a moment ago) and a save still fit."""
        if self.ends is None:
            return None
        step, save = (heartbeat.longest_step_s, heartbeat.longest_save_s) if heartbeat is not None else (0.0, 0.0)
        return self.ends - self.margin_s - _SAFETY * (step + save)

    def last_moment(self) -> float | None:
        """Time at which steps are ended without waiting for the save any longer, so that this job can still requeue."""
        if self.ends is None:
            return None
        return self.ends - min(self.grace_s, self.margin_s)


class WalltimeWatch:
    """The guard of a limit that an administrator may move either way: `read` is asked for it now and then."""

    def __init__(self, guard: WalltimeGuard, read: Callable[[], float | None]) -> None:
        self.guard = guard
        self._read = read
        self._read_at = time.time()

    def refresh(self) -> None:
        """Where `read` knows of no limit, the last known one stays."""
        now = time.time()
        if self.guard.ends is None or now - self._read_at < _READ_INTERVAL_S:
            return
        self._read_at = now
        ends = self._read()
        if ends is not None and ends != self.guard.ends:
            log.info("the time limit has moved by %+.0f s", ends - self.guard.ends)
            self.guard = replace(self.guard, ends=ends)
