"""The files of a finished run that the report is made of, read and checked once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from megatron_r1reward.evaluation.result import EvaluationResult, Interval
from megatron_r1reward.monitor.sinks import read_rows
from megatron_r1reward.monitor.timers import read_timeline

T = TypeVar("T")
BEST_OF_FILE = "use/best_of_n.json"


class _FileModel(BaseModel):
    model_config = ConfigDict(frozen=True)  # unknown keys are left alone: a newer run may hold more


class TimingFile(_FileModel):
    """`timing.json`: seconds of the pipeline's phases, and from its start to its end."""

    phases: dict[str, float]
    wall_seconds: float


class BestOfFile(_FileModel):
    """`BEST_OF_FILE`: the trained model picked the best of several responses, one of them right, about each image."""

    images: int
    candidates: int
    right: float  # share of the images whose right response was picked; without a reward: not picked
    right_interval: Interval
    judgements: int  # of all images
    failed: int  # images without a reward


_NEEDED = (
    "sft/metrics.jsonl",
    "rl/metrics.jsonl",
    "eval_sft/evaluation.json",
    "eval_rl/evaluation.json",
    "timing.json",
    "difficulty.json",
)


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """Everything the report shows. Metric rows are `{"step": int, "time": float, <name>: float | None}`."""

    name: str
    sft: EvaluationResult
    rl: EvaluationResult
    sft_rows: tuple[dict[str, Any], ...]
    rl_rows: tuple[dict[str, Any], ...]
    timing: TimingFile
    timeline: tuple[dict[str, Any], ...]  # of the RL stage; () where the run did not record one
    best_of: BestOfFile | None  # None: the run did not try
    difficulty: dict[str, int]  # attempts needed ("1", "2", ..., "never") -> number of preferences


def check_complete(run_dir: Path) -> None:
    """ValueError that names every file that a report needs and the run has not written."""
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder: name the directory that holds the stages of a run")
    if missing := [name for name in _NEEDED if not (run_dir / name).is_file()]:
        raise ValueError(f"{run_dir} lacks {', '.join(missing)}: finish the run before making its report")


def read_run(run_dir: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        ValueError: files are missing (all are named), a file is not what it should be, or it has no rows.
    """
    check_complete(run_dir)
    return RunFiles(
        name=run_dir.resolve().name,
        sft=_read(run_dir / "eval_sft/evaluation.json", EvaluationResult),
        rl=_read(run_dir / "eval_rl/evaluation.json", EvaluationResult),
        sft_rows=_rows(run_dir / "sft/metrics.jsonl"),
        rl_rows=_rows(run_dir / "rl/metrics.jsonl"),
        timing=_read(run_dir / "timing.json", TimingFile),
        timeline=tuple(read_timeline(run_dir / "rl/timeline.jsonl")),
        best_of=_read(run_dir / BEST_OF_FILE, BestOfFile) if (run_dir / BEST_OF_FILE).is_file() else None,
        difficulty=_read(run_dir / "difficulty.json", dict[str, int]),
    )


def _read(path: Path, kind: type[T]) -> T:
    try:
        return TypeAdapter(kind).validate_python(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, ValidationError) as error:
        raise ValueError(f"{path} is not what the report expects, write it anew: {error}") from error


def _rows(path: Path) -> tuple[dict[str, Any], ...]:
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path} has no rows: the stage did not log a step")
    return tuple(rows)
