"""A stage's inputs, examined without loading a model: model folders, data, lengths, settings, disk; all at once."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_r1reward.cluster.placement import Stage
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.preference import ReadResult, SftReadResult
from megatron_r1reward.data.stage_data import read_stage
from megatron_r1reward.doctor.finding import Finding, error, note, ok, warning
from megatron_r1reward.launch.stage_models import check_settings, model_problems
from megatron_r1reward.model_folder.shape import load_shape
from megatron_r1reward.planner.catalog import find_critic
from megatron_r1reward.planner.parameters import all_tensors, by_component

_GB = 1e9
_REASONS = 3  # of rows that are set aside, the most frequent ones


def stage_of(config: RunConfig) -> Stage:
    """The stage that a run file is for, by its sections.

    Raises:
        ValueError: it has none or several.
    """
    sections: dict[str, Stage] = {
        "sft": "sft",
        "reward_model": "rm",
        "rl": "rl",
        "annotate": "annotate",
        "evaluation": "eval",
    }
    given = [stage for section, stage in sections.items() if section in config.model_fields_set]
    if {"rl", "rm"} & set(given) and "eval" in given:  # its probes are evaluations
        given.remove("eval")
    if len(given) != 1:
        found = ", ".join(given) if given else "no section of a stage"
        raise ValueError(f"the run file has {found}: say with --stage which stage is meant")
    return given[0]


def check_run_file(config: RunConfig, stage: Stage) -> list[Finding]:
    """Everything that would stop this stage, or set its rows aside, before it is started."""
    findings = list(_settings(config, stage))
    findings += list(_models(config, stage))
    if stage not in ("judge", "serve"):
        findings += list(_data(config, stage))
    if stage in ("sft", "rm", "rl"):
        findings += list(_disk(config, stage))
    return findings


def _settings(config: RunConfig, stage: Stage) -> Iterator[Finding]:
    try:
        check_settings(config, stage)
    except ValueError as problem:
        yield error("run.settings", str(problem), "change it in the run file")


def _models(config: RunConfig, stage: Stage) -> Iterator[Finding]:
    clean = True
    for key, folder, problem in model_problems(config, stage):
        clean = False
        text, _, fix = problem.rpartition(": ")
        yield error("run.model", f"{key} {folder}: {text or problem}", fix if text else f"mend {folder}")
    if clean:
        yield ok("run.model", "the model folders hold what the stage reads")


def _data(config: RunConfig, stage: Stage) -> Iterator[Finding]:
    """Rows are read as the stage reads them: into a folder that goes again."""
    assert stage != "judge" and stage != "serve"
    with tempfile.TemporaryDirectory(prefix="r1reward-doctor-") as folder:
        try:
            found = read_stage(config, stage, output=Path(folder))
        except (ValueError, OSError) as problem:
            yield error("run.data", " ".join(str(problem).split()), "change data or run file as the message says")
            return
        for key, result in found.items():
            yield from _rows(config, key, result)


def _rows(config: RunConfig, key: str, result: ReadResult | SftReadResult) -> Iterator[Finding]:
    usable = len(result.examples if isinstance(result, SftReadResult) else result.preferences)
    message = f"{key}: {usable} usable rows, {result.quarantined} set aside"
    if not result.quarantined or result.quarantine_path is None:
        yield ok("run.data", message)
        return
    rows = (json.loads(line) for line in result.quarantine_path.read_text(encoding="utf-8").splitlines())
    reasons = Counter(str(row.get("reason", row.get("error", "no reason given")))[:200] for row in rows)
    some = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(_REASONS))
    yield warning("run.data", f"{message}: {some}", "mend these rows, or go on without them: the stage does")


def _disk(config: RunConfig, stage: Stage) -> Iterator[Finding]:
    """Room for the checkpoints that are kept, one that is being written, and the exported folder."""
    try:
        shape = load_shape(config.model.path)
    except ValueError:
        return  # said by the model's check
    place = config.run.output_dir.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        yield error("run.disk", f"{place} cannot be written", "set run.output_dir to a folder of yours")
        return
    values = sum(by_component(all_tensors(shape)).values())
    if stage == "rl" and (critic := find_critic(config)) is not None:
        values += sum(by_component(all_tensors(critic)).values())
    width = 4 if config.model.precision == "fp32" else 2
    # Weights, float32 copies of bfloat16 ones, and two float32 moments.
    checkpoint = values * (width + (4 if width == 2 else 0) + 8)
    section = config.checkpoint
    kept = section.keep_last + section.keep_best + 1
    needed, free = kept * checkpoint + values * width, shutil.disk_usage(place).free
    message = f"{kept} checkpoints of {checkpoint / _GB:.1f} GB and an export need {needed / _GB:.1f} GB in {place}"
    message += f", which has {free / _GB:.1f} GB free"
    if needed > free:
        yield error("run.disk", message, "free space, set run.output_dir elsewhere, or lower checkpoint.keep_last")
    else:
        yield ok("run.disk", message)
    if section.keep_every is not None:
        yield note("run.disk", f"checkpoint.keep_every keeps every {section.keep_every}th checkpoint besides")
