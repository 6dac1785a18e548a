"""Profile chosen optimizer steps of a run: Chrome traces by torch's profiler, or a capture range for Nsight Systems."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_r1reward.config.schema import ProfileSection

log = logging.getLogger(__name__)


class StepProfiler:
    """Wrap every step in `step`; nothing happens outside the chosen steps and ranks.

    "torch" writes `<output_dir>/profile/rank<r>-step<n>.json`. "nsys" marks the range for
    `nsys profile --capture-range=cudaProfilerApi`.

    Raises:
        ValueError: "nsys" without a GPU.
    """

    def __init__(self, section: ProfileSection, *, output_dir: Path, rank: int) -> None:
        if section.start_step is not None and section.tool == "nsys" and not torch.cuda.is_available():
            raise ValueError("profile.tool 'nsys' marks CUDA ranges, but there is no GPU: use 'torch'")
        self.section = section
        self.folder = output_dir / "profile"
        self.rank = rank

    def _is_chosen(self, number: int) -> bool:
        first = self.section.start_step
        return first is not None and self.rank in self.section.ranks and first <= number < first + self.section.steps

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Run step `number` (from 1), profiled when it is chosen."""
        if not self._is_chosen(number):
            yield
        elif self.section.tool == "nsys":
            torch.cuda.profiler.start()
            yield
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        else:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            with profile(activities=activities) as profiler:
                yield
            self.folder.mkdir(parents=True, exist_ok=True)
            trace = self.folder / f"rank{self.rank}-step{number}.json"
            profiler.export_chrome_trace(str(trace))
            log.info("profile of step %d: %s", number, trace)
