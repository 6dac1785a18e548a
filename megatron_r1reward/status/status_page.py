"""The status as a page or as JSON."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from megatron_r1reward.run_dir import ExitReport, duration
from megatron_r1reward.status.read import BAD, RunStatus, read_status

_STYLE = {
    "running": "green", "done": "green", "starting": "cyan", "waiting": "cyan", "unknown": "yellow",
    "silent": "yellow", "failed": "bold red", "cancelled": "bold red", "died": "bold red",
}  # fmt: skip
_MEANING = {
    "unknown": "nothing has run here under a launcher yet",
    "silent": "no sign of life for too long: it may hang (docs/cluster.md)",
    "waiting": "saved; waiting for another turn",
    "died": "ended without a word: killed, or its node failed",
}


def to_json(status: RunStatus) -> str:
    """The fields of `RunStatus`, `run_dir` as text."""
    return json.dumps(dataclasses.asdict(status) | {"run_dir": str(status.run_dir)}, indent=2)


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def _progress(status: RunStatus) -> list[str]:
    parts = []
    if status.step is not None:
        share = f" ({100 * status.step / status.total_steps:.0f} %)" if status.total_steps else ""
        parts.append(f"step {status.step}{f' of {status.total_steps}' if status.total_steps else ''}{share}")
    if status.seconds_per_step is not None:
        parts.append(f"{status.seconds_per_step:.3g} s per step")
    if status.eta_s is not None:
        parts.append(f"about {duration(status.eta_s)} left")
    if status.saved_step is not None:
        parts.append(f"checkpoint at step {status.saved_step}")
    return [", ".join(parts)] if parts else []


def _place(status: RunStatus, now: float) -> list[str]:
    info = status.info
    if info is None:
        return []
    job = f"job {info.job_id}" if info.job_id else "local"
    queue = f" ({status.queue_state})" if status.queue_state else ""
    lines = [f"{job}{queue} on {info.host} since {_clock(info.started)}, life {info.life}"]
    if info.ends is not None and status.state in ("running", "starting", "silent"):
        lines.append(f"time limit in {duration(max(0.0, info.ends - now))}")
    for part in info.components:
        gpus = f", {part.gpus_per_node} GPUs per node" if part.gpus_per_node else ""
        lines.append(f"{part.name}: {part.tasks} task(s) on {','.join(part.nodes)}{gpus}")
    return lines


def _end(report: ExitReport) -> list[str]:
    lines = [f"ended {_clock(report.time)} with exit code {report.code}: {report.reason}"]
    if report.log_tail and report.outcome == "failed":
        lines.append(f"last lines of {report.log}:")
        lines += [f"  {line}" for line in report.log_tail]
    return lines


def show(status: RunStatus, console: Console) -> None:
    """One page: state, progress, where it runs, servers, metrics, earlier lives, why it stopped."""
    style = _STYLE[status.state]
    meaning = f" ({_MEANING[status.state]})" if status.state in _MEANING else ""
    title = f"{status.run_dir}{f'  {status.stage}' if status.stage else ''}"
    console.print(f"[bold]{escape(title)}[/]  [{style}]{status.state}[/]{escape(meaning)}", highlight=False)
    lines = _progress(status) + _place(status, time.time())
    if status.silent_s is not None and status.state in ("running", "starting", "silent"):
        lines.append(f"trainer: {status.phase}, last sign of life {duration(status.silent_s)} ago")
    lines += [f"{server.component} is ready at {server.url}" for server in status.servers]
    if status.metrics:
        values = "  ".join(f"{name} {value:.4g}" for name, value in status.metrics.items())
        lines.append(f"metrics at step {status.metrics_step}: {values}")
    earlier = [life for life in status.lives if status.why is None or life.life != status.why.life]
    for life in earlier:
        lines.append(f"life {life.life}: {life.outcome} after step {life.step}: {life.reason}")
    if status.why is not None:
        lines += _end(status.why)
    if status.log is not None:
        lines.append(f"last lines of {status.log}:")
        lines += [f"  {line}" for line in status.log_tail]
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def run_status(run_dir: Path, *, as_json: bool) -> int:
    """Print; returns the exit code: 1 for a run that has failed, died, was cancelled or is silent, else 0.

    Raises:
        ValueError: `run_dir` is not a folder, or one of its files cannot be read.
    """
    status = read_status(run_dir)
    if as_json:
        print(to_json(status))
    else:
        show(status, Console())
    return 1 if status.state in BAD else 0
