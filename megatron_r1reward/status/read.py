"""Read a run directory. Works on a login node: nothing is asked but the files and, where it is there, squeue."""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_r1reward.cluster import commands
from megatron_r1reward.monitor.sinks import HEADLINE
from megatron_r1reward.run_dir import Address, Component, ExitReport, Heartbeat, RunDir, RunInfo, last_lines

# starting: servers or model are loading. silent: running, but without a sign of life for too long. waiting: saved, and
# another turn was asked for. died: it ended without a word (killed, or its node failed). unknown: nothing has run yet.
State = Literal["unknown", "starting", "running", "silent", "waiting", "done", "failed", "cancelled", "died"]
BAD: frozenset[State] = frozenset({"failed", "cancelled", "died", "silent"})

# Stages without a trainer say no more than that their servers are ready.
_WITHOUT_HEARTBEAT = ("eval", "annotate", "judge", "serve")
_SILENT_MIN_S = 300.0
_SILENT_STEPS = 10
_START_MAX_S = 1800.0
_RATE_ROWS = 20
_TAIL_BYTES = 256 << 10
_LOG_LINES = 15


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Times are seconds; None: not known."""

    run_dir: Path
    state: State
    stage: str | None
    phase: str | None  # of the trainer: loading, training, saving, exporting, stopped, done
    step: int | None
    total_steps: int | None
    saved_step: int | None
    seconds_per_step: float | None  # median of the last steps, all phases together
    eta_s: float | None
    silent_s: float | None  # since the trainer's last sign of life
    metrics_step: int | None
    metrics: Mapping[str, float]  # headline metrics of that step
    info: RunInfo | None
    queue_state: str | None  # Slurm's word for the job, where squeue could be asked
    servers: tuple[Address, ...]
    lives: tuple[ExitReport, ...]  # of the lives that have ended, in order
    why: ExitReport | None  # how the last life ended, when none is in progress
    log: str | None = None  # of what died without a word
    log_tail: tuple[str, ...] = field(default=())


def read_status(run_dir: Path, *, now: float | None = None) -> RunStatus:
    """Raises ValueError when `run_dir` is not a folder, or one of its files cannot be read."""
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a folder: give the run.output_dir of a stage")
    now = time.time() if now is None else now
    run = RunDir(root=run_dir)
    info, heartbeat = RunInfo.read(run.run_info), Heartbeat.read(run.heartbeat)
    lives = _lives(run)
    last = ExitReport.read(run.exit_report)
    queue_state = _queue_state(info)
    state = _state(run, info, heartbeat, last, queue_state, now)
    rows = last_rows(run.metrics)
    rate = _rate(rows)
    step, total = _steps(heartbeat, rows)
    log = _last_log(run, info) if state in ("died", "silent") else None
    return RunStatus(
        run_dir=run_dir,
        state=state,
        stage=info.stage if info is not None else None,
        phase=heartbeat.phase if heartbeat is not None else None,
        step=step,
        total_steps=total,
        saved_step=heartbeat.saved_step if heartbeat is not None else last.saved_step if last is not None else None,
        seconds_per_step=rate,
        eta_s=rate * (total - step) if state == "running" and rate and total and step is not None else None,
        silent_s=max(0.0, now - heartbeat.time) if heartbeat is not None else None,
        metrics_step=rows[-1]["step"] if rows else None,
        metrics={name: rows[-1][name] for name in HEADLINE if isinstance(rows[-1].get(name), float)} if rows else {},
        info=info,
        queue_state=queue_state,
        servers=tuple(_servers(run)),
        lives=lives,
        why=last if state in ("waiting", "done", "failed", "cancelled") else None,
        log=str(log.relative_to(run_dir)) if log is not None else None,
        log_tail=last_lines(log)[-_LOG_LINES:] if log is not None else (),
    )


def _state(
    run: RunDir,
    info: RunInfo | None,
    heartbeat: Heartbeat | None,
    last: ExitReport | None,
    queue_state: str | None,
    now: float,
) -> State:
    if run.done.exists():
        return "done"
    if last is not None and (info is None or last.life >= info.life):
        return {"requeue": "waiting", "done": "done", "cancelled": "cancelled"}.get(last.outcome, "failed")  # type: ignore[return-value]
    if info is None and heartbeat is None:
        return "unknown"
    if _is_gone(info, heartbeat, queue_state):
        return "waiting" if queue_state == "PENDING" else "died"
    if info is not None and info.stage in _WITHOUT_HEARTBEAT and _servers_are_ready(run, info):
        return "running"
    if heartbeat is None or heartbeat.phase == "loading":
        began = heartbeat.time if heartbeat is not None else info.started if info is not None else now
        return "starting" if now - began < _START_MAX_S else "silent"
    if heartbeat.phase == "done":
        return "done"
    patience = max(_SILENT_MIN_S, _SILENT_STEPS * (heartbeat.longest_step_s + heartbeat.longest_save_s))
    return "silent" if now - heartbeat.time > patience else "running"


def _servers_are_ready(run: RunDir, info: RunInfo) -> bool:
    return all(run.address(part.name).exists() for part in info.components if _is_server(part))


def _is_server(part: Component) -> bool:
    """Servers are numbered; drivers ("trainer", "evaluate") are not."""
    return "-" in part.name


def _is_gone(info: RunInfo | None, heartbeat: Heartbeat | None, queue_state: str | None) -> bool:
    """Whether what should be running is certainly not. Processes on other hosts are given the benefit of the doubt."""
    if queue_state is not None:
        return queue_state not in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
    who = info or heartbeat
    assert who is not None
    return who.host == socket.gethostname() and not _alive(who.pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _queue_state(info: RunInfo | None) -> str | None:
    """Slurm's state of the run's job; "GONE" when Slurm does not know it any more; None where squeue cannot tell."""
    if info is None or info.job_id is None:
        return None
    output = commands.run(
        ["squeue", "--noheader", "--states=all", f"--jobs={info.job_id}", "--format=%T"], timeout_s=10
    )
    if output.code == 0:
        return output.stdout.split()[0] if output.stdout.split() else "GONE"
    return "GONE" if "Invalid job id" in (output.problem or "") else None


def _lives(run: RunDir) -> tuple[ExitReport, ...]:
    reports = (ExitReport.read(run.life_report(life)) for life in run.lives())
    return tuple(report for report in reports if report is not None)


def _servers(run: RunDir) -> list[Address]:
    found = (Address.read(path) for path in sorted(run.live.glob("*.address.json")))
    return [address for address in found if address is not None]


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of a metrics file, however long it is; a torn line at either end is left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    if size > _TAIL_BYTES:
        lines = lines[1:]
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _rate(rows: list[dict[str, Any]]) -> float | None:
    """Seconds per step; a pause between two lives is an outlier that the median ignores."""
    times = [(row["step"], row["time"]) for row in rows[-_RATE_ROWS - 1 :] if "time" in row]
    pairs = itertools.pairwise(times)
    gaps = [(late - early) / (after - before) for (before, early), (after, late) in pairs if after > before]
    return statistics.median(gaps) if gaps else None


def _steps(heartbeat: Heartbeat | None, rows: list[dict[str, Any]]) -> tuple[int | None, int | None]:
    """(finished steps, all steps). While a resumed trainer loads, the metrics know better than its heartbeat."""
    logged = rows[-1]["step"] if rows else None
    if heartbeat is None:
        return logged, None
    return (logged if heartbeat.phase == "loading" else heartbeat.step), heartbeat.total_steps


def _last_log(run: RunDir, info: RunInfo | None) -> Path | None:
    """The log to read first: the driver's, else any of the life's components, else the supervisor's."""
    lives = run.lives()
    if not lives:
        return None
    life = info.life if info is not None else lives[-1]
    names = [_driver(info.components)] if info is not None and info.components else []
    for name in (*names, "trainer", "evaluate", "annotate", "supervisor"):
        path = run.log(life, name)
        if path.is_file() and path.stat().st_size:
            return path
    return None


def _driver(components: tuple[Component, ...]) -> str:
    named = [part.name for part in components if not _is_server(part)]
    return named[0] if named else components[0].name
