"""The outer loop of SFT and RL: train a step, save when it is due, stop when that is asked for, report.

    begin -> [ step -> probe -> save? -> report ] ... -> export -> done
                                    `-> stopped: saved, and the next start continues here

What the stages differ in is in `Stage`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from megatron_r1reward.config.schema import ProfileSection, RunConfig
from megatron_r1reward.monitor.sinks import Monitor
from megatron_r1reward.monitor.timers import PhaseTimer, Timeline
from megatron_r1reward.training import resume
from megatron_r1reward.training.alarms import SignalGoneError
from megatron_r1reward.training.heartbeat import RunControl
from megatron_r1reward.training.state import TrainState

log = logging.getLogger(__name__)
Metrics = dict[str, float]


def set_threads(config: RunConfig) -> None:
    """How many threads torch takes in this rank; by default all cores."""
    if config.run.num_threads:
        torch.set_num_threads(config.run.num_threads)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage to the loop. All ranks call `step`; the other functions matter on the main rank.

    Attributes:
        title: of the progress bar.
        steps: of the whole stage.
        step: trains the step after `state.step`, and counts it there; gets the timer for phases of its own.
        headline: short name -> metric, beside the progress bar.
        probe: what measures held-out accuracy after step n, None where that is not due.
        report: metrics of the finished step that its timer tells.
        producer: RL: what a checkpoint keeps of the batches ahead.
        saves_before: errors that do not concern the weights: what was trained is saved before they are raised.
        watch: from a step's metrics and number, why the run should not go on; on every rank the same.
    """

    title: str
    steps: int
    step: Callable[[PhaseTimer], Metrics]
    headline: Mapping[str, str]
    monitor: Monitor | None = None
    timeline: Timeline | None = None
    probe: Callable[[int], Callable[[], float] | None] = lambda step: None
    report: Callable[[PhaseTimer], Metrics] = lambda timer: {}
    producer: Callable[[], Mapping[str, Any] | None] = lambda: None
    saves_before: tuple[type[Exception], ...] = ()
    watch: Callable[[Metrics, int], str | None] = lambda metrics, step: None


def run_to_end(state: TrainState, stage: Stage, control: RunControl) -> bool:
    """Step by step to the last one: True. False: asked to stop, and saved.

    Raises:
        SignalGoneError: `Stage.watch` named a reason; saved.
    """
    every = state.config.checkpoint.save_every
    main = state.topology.is_main
    progress = tqdm(
        total=stage.steps, initial=state.step, desc=stage.title, unit="step", disable=not main, dynamic_ncols=True
    )
    timer = PhaseTimer(on_phase=None if stage.timeline is None else stage.timeline.add)
    profiler = StepProfiler(state.config.profile, output_dir=state.config.run.output_dir, rank=state.topology.rank)
    stopped = False
    while state.step < stage.steps and not stopped:
        timer.reset()
        if stage.timeline is not None:
            stage.timeline.step = state.step + 1
        with timer.phase("step"):
            metrics = _step_or_save(state, stage, timer, profiler)
        if (probe := stage.probe(state.step)) is not None:
            with timer.phase("heldout"):
                metrics["heldout/accuracy"] = probe()
        control.finished_step(state.step)
        stopped = state.step < stage.steps and control.stop_requested()
        with timer.phase("save"):
            state.saver.poll()
            if state.step % every == 0 or state.step == stage.steps or stopped:
                control.saving()
                resume.save(state, score=metrics.get("heldout/accuracy"), producer=stage.producer())
                control.saved(state.step)
        if stage.monitor is not None:
            stage.monitor.log(state.step, metrics | timer.metrics() | stage.report(timer))
        progress.set_postfix({short: f"{metrics[name]:.3g}" for short, name in stage.headline.items()})
        progress.update()
        if (reason := stage.watch(metrics, state.step)) is not None and state.step < stage.steps:
            if not stopped:
                _save_unless_saved(state, stage)
            raise SignalGoneError(f"saved after step {state.step}; {reason}")
    progress.close()
    return not stopped


def _step_or_save(state: TrainState, stage: Stage, timer: PhaseTimer, profiler: StepProfiler) -> Metrics:
    try:
        with profiler.step(state.step + 1):
            return stage.step(timer)
    except stage.saves_before as error:
        _save_unless_saved(state, stage)
        log.error("saved after step %d; the run stops: %s", state.step, error)
        raise


def _save_unless_saved(state: TrainState, stage: Stage) -> None:
    if state.step % state.config.checkpoint.save_every:
        resume.save(state, producer=stage.producer())
    state.saver.close()


def finish(state: TrainState, control: RunControl, *, finished: bool) -> Path | None:
    """Export the last weights and say that the stage is done; None when it stops before. All ranks."""
    state.saver.close()
    if not finished:
        resume.leave(control)
        return None
    control.exporting()
    folder = state.config.run.output_dir / "hf"
    resume.export(state, folder)
    result = {"hf": folder}
    if state.critic is not None:
        result["critic"] = state.config.run.output_dir / "critic"
        resume.export(state.critic, result["critic"])
    resume.mark_done(state, **result)
    control.done()
    return folder


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
