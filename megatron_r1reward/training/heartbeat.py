"""The trainer's side of `live/`: heartbeats out, the request to save and stop in."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.run_dir import Heartbeat, Phase, RunDir, exists_on_shared

_MIN_BEAT_INTERVAL_S = 0.5  # steps of a tiny model are faster than a shared file system should be asked to follow


class RunControl:
    """One per rank. Only the main rank touches files; `stop_requested` is collective.

    Args:
        root: the run directory.
        total_steps: of the stage.
    """

    def __init__(self, root: Path, topology: Topology, *, total_steps: int | None = None) -> None:
        self._run = RunDir(root=root)
        self._topology = topology
        self._total_steps = total_steps
        self._first_step: int | None = None
        self._step = 0
        self._saved_step: int | None = None
        self._longest_step_s = 0.0
        self._longest_save_s = 0.0
        self._mark = time.monotonic()  # when the step in progress began
        self._last_beat = 0.0

    def loading(self) -> None:
        """The first sign of life: model and data are about to be read."""
        self._beat("loading", force=True)

    def begin(self, step: int, *, resumed: bool) -> None:
        """Training starts after `step` finished steps."""
        self._step = self._first_step = step
        self._saved_step = step if resumed else None
        self._mark = time.monotonic()
        self._beat("training", force=True)

    def finished_step(self, step: int) -> None:
        now = time.monotonic()
        self._longest_step_s = max(self._longest_step_s, now - self._mark)
        self._mark = now
        self._step = step
        self._beat("training")

    def saving(self) -> None:
        self._mark = time.monotonic()
        self._beat("saving", force=True)

    def saved(self, step: int) -> None:
        now = time.monotonic()
        self._longest_save_s = max(self._longest_save_s, now - self._mark)
        self._mark = now
        self._saved_step = step
        self._beat("training", force=True)

    def exporting(self) -> None:
        self._beat("exporting", force=True)

    def stopped(self) -> None:
        """Saved, and about to leave before the last step."""
        self._beat("stopped", force=True)

    def done(self) -> None:
        self._beat("done", force=True)

    def stop_requested(self) -> bool:
        """Whether to save and stop now; the main rank looks, and all ranks learn the same answer. Collective."""
        wanted = self._topology.is_main and exists_on_shared(self._run.stop)
        return self._topology.from_main(wanted)

    def _beat(self, phase: Phase, *, force: bool = False) -> None:
        now = time.time()
        if not self._topology.is_main or (not force and now - self._last_beat < _MIN_BEAT_INTERVAL_S):
            return
        self._last_beat = now
        Heartbeat(
            component="trainer",
            host=socket.gethostname(),
            pid=os.getpid(),
            time=now,
            phase=phase,
            step=self._step,
            total_steps=self._total_steps,
            first_step=self._first_step,
            longest_step_s=self._longest_step_s,
            longest_save_s=self._longest_save_s,
            saved_step=self._saved_step,
        ).write(self._run.heartbeat)
