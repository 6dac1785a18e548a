"""What stages without servers have in common: passes over rows in an order drawn from the seed, to the export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from megatron_r1reward.config.rl_sections import SftSection
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.loader import DataStage, StagedSampler
from megatron_r1reward.data.preference_row import SftExample
from megatron_r1reward.data.selection import SelectedRows, select_rows
from megatron_r1reward.model_folder.prompt_policy import PromptPolicy
from megatron_r1reward.monitor.sinks import build_monitor
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training import resume
from megatron_r1reward.training.heartbeat import RunControl
from megatron_r1reward.training.loop import Metrics, Stage, finish, run_to_end
from megatron_r1reward.training.models_read import described_parts, models_read
from megatron_r1reward.training.state import TrainState, build_state
from megatron_r1reward.types import Preference

RowT = TypeVar("RowT", Preference, SftExample)


@dataclass(frozen=True, kw_only=True)
class SupervisedStage:
    """What `sft` and `rm` differ in.

    Attributes:
        section: steps, epochs and batch size.
        selected: what a batch is drawn from, see `select_together`.
        step: trains the step after `state.step`, and counts it there.
        described: what the exported folder will say about itself, from the number of steps.
        probe: held-out accuracy of the current weights, on every rank; asked every `probe_every` steps.
    """

    name: Literal["sft", "rm"]
    title: str
    section: SftSection
    selected: SelectedRows[Preference] | SelectedRows[SftExample]
    step: Callable[[TrainState, StagedSampler], Metrics]
    headline: Mapping[str, str]
    described: Callable[[int], PromptPolicy | None]
    score_layers: int = 0
    probe: Callable[[TrainState], float] | None = None
    probe_every: int | None = None


def check_batch(section: SftSection, name: str, topology: Topology) -> None:
    """ValueError when a data-parallel rank would have no row."""
    if section.global_batch_size < topology.data_parallel_size:
        raise ValueError(
            f"{name}.global_batch_size {section.global_batch_size} is smaller than the {topology.data_parallel_size} "
            "data-parallel ranks: every rank needs a row"
        )


def select_together(
    rows: Sequence[RowT], set_aside: frozenset[str], config: RunConfig, section: SftSection, topology: Topology
) -> SelectedRows[RowT]:
    """What `config.data` selects of the rows that every rank has read; collective. One rank reads the images and the
    files that say something of the rows, and tells the others.

    Raises:
        ValueError: a file cannot be read, or no row is left.
    """

    def select() -> tuple[Mapping[str, str], tuple[DataStage, ...]]:
        found = select_rows(
            rows,
            config.data,
            batch_size=section.global_batch_size,
            steps=section.steps_of,
            set_aside=set_aside,
        )
        return found.contents, found.stages

    contents, stages = topology.decided_by_main(select)
    of = {row.id: row for row in rows}
    return SelectedRows(rows=tuple(of[name] for name in contents), contents=contents, stages=stages)


def run_supervised(config: RunConfig, topology: Topology, stage: SupervisedStage) -> Path | None:
    """Run the stage to its end and return the exported Hugging Face folder; None when it was asked to save and stop."""
    section, output = stage.section, config.run.output_dir
    rows = len(stage.selected.rows)
    draws, steps = None if section.steps else section.epochs * rows, section.steps_of(rows)
    control = RunControl(output, topology, total_steps=steps)
    control.loading()
    state = build_state(config, topology, optimizer_steps=steps, score_layers=stage.score_layers)
    state.data = resume.describe_data(
        stage.selected.contents,
        seed=config.run.seed,
        batch_size=section.global_batch_size,
        stages=stage.selected.description,
    )
    state.models = models_read(config, topology, rl=False)
    state.parts = described_parts(config)
    state.described = stage.described(steps)
    resumed = resume.resume(state)
    resume.prepare(state)
    sampler = StagedSampler(
        rows,
        seed=config.run.seed,
        stages=stage.selected.stages,
        draws=draws,
        at_least=topology.data_parallel_size,
    )
    monitor = (
        build_monitor(config.monitor, output, stage.name, resumed_step=state.step if resumed else None)
        if topology.is_main
        else None
    )

    def probe(step: int) -> Callable[[], float] | None:
        measure, every = stage.probe, stage.probe_every
        return None if measure is None or every is None or step % every else lambda: measure(state)

    loop = Stage(
        title=stage.title,
        steps=steps,
        step=lambda timer: stage.step(state, sampler),
        headline=stage.headline,
        monitor=monitor,
        probe=probe,
    )
    control.begin(state.step, resumed=resumed)
    folder = finish(state, control, finished=run_to_end(state, loop, control))
    if monitor is not None:
        monitor.close()
    return folder
