"""Submit tasks as one experiment, wait, and tell how each ended. NeMo-Run itself leaves with 0 whatever happened."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nemo_run as run
from rich.console import Console
from rich.markup import escape

from launching.chain import Task
from launching.factories import script, slurm_executor
from megatron_r1reward.run_dir import ExitReport, RunDir

_SUCCESS = "SUCCEEDED"
_LOG_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Request:
    """How to run an experiment. `slurm` are `key=value` settings, `site` is the `[slurm]` table of the site file."""

    title: str
    executor: Literal["local", "slurm"]
    site: dict[str, Any]
    slurm: tuple[str, ...] = ()
    dry_run: bool = False
    detach: bool = False
    tail_logs: bool = False


def run_experiment(tasks: Sequence[Task], request: Request) -> int:
    """Returns 0 when every task succeeded (or was only shown, or handed over to Slurm), else 1.

    Raises:
        ValueError: a setting cannot be used.
    """
    console = Console()
    started = time.time()
    # On one machine NeMo-Run starts the next task although the one before has failed: each looks for itself.
    with tempfile.TemporaryDirectory(prefix="r1reward-chain-") as folder:
        done = {task.name: Path(folder) / task.name for task in tasks} if request.executor == "local" else {}
        with run.Experiment(request.title, skip_status_at_exit=True, enable_goodbye_message=False) as experiment:
            for task in tasks:
                _add(experiment, task, request, done)
            if request.dry_run:
                _show(tasks, experiment, console)
                return 0
            experiment.run(detach=request.detach, tail_logs=request.tail_logs)
        if request.detach and request.executor == "slurm":
            _tell_jobs(experiment, tasks, console)
            return 0
        return _tell_end(experiment, tasks, console, since=started)


def _add(experiment: run.Experiment, task: Task, request: Request, done: dict[str, Path]) -> None:
    if request.executor == "local":
        own_script = script(task, done=done[task.name], wanted=[(name, done[name]) for name in task.after])
        executor: run.Executor = run.LocalExecutor()
    else:
        own_script = script(task)
        executor = slurm_executor(task.name, request.site, request.slurm)
    experiment.add(own_script, executor=executor, name=task.name, dependencies=list(task.after))


def _show(tasks: Sequence[Task], experiment: run.Experiment, console: Console) -> None:
    """The scripts that would run, and for Slurm the sbatch scripts around them; nothing is left behind."""
    experiment.dryrun(log=False, delete_exp_dir=False)
    folder = Path(experiment.jobs[0].executor.job_dir).parent
    for task, job in zip(tasks, experiment.jobs, strict=True):
        console.rule(f"{task.name}" + (f", after {', '.join(task.after)}" if task.after else ""))
        for path in (*folder.glob(f"*{job.id}_sbatch.sh"), *folder.glob(f"{task.name}/scripts/*.sh")):
            console.print(f"# {path}\n{path.read_text()}", markup=False, highlight=False, soft_wrap=True)
    shutil.rmtree(folder)


def _tell_jobs(experiment: run.Experiment, tasks: Sequence[Task], console: Console) -> None:
    states = experiment.status(return_dict=True)
    for task in tasks:
        console.print(f"{task.name}: job {states[task.name]['job_id']}" + _look(task), markup=False)


def _look(task: Task) -> str:
    return f"; r1reward status {task.run_dir}" if task.run_dir is not None else ""


def _tell_end(experiment: run.Experiment, tasks: Sequence[Task], console: Console, *, since: float) -> int:
    states = experiment.status(return_dict=True)
    console.print()
    code = 0
    for task in tasks:
        state = states[task.name]["status"].name
        good = state == _SUCCESS
        console.print(
            f"[{'green' if good else 'bold red'}]{task.name}: {state}[/]{escape(_look(task))}", highlight=False
        )
        if not good:
            code = 1
            _explain(task, Path(states[task.name]["local_dir"]), console)
    return code


def _explain(task: Task, folder: Path, console: Console) -> None:
    """Why it failed: the run directory's report, else the end of NeMo-Run's log."""
    report = ExitReport.read(RunDir(root=task.run_dir).exit_report) if task.run_dir is not None else None
    if report is not None and report.outcome != "done":
        lines = [report.reason, *report.log_tail]
    else:
        logs = sorted((path for path in folder.rglob("*") if _is_log(path)), key=lambda path: path.stat().st_mtime)
        lines = [line for path in logs[-1:] for line in path.read_text(errors="replace").splitlines()]
    for line in lines[-_LOG_LINES:]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _is_log(path: Path) -> bool:
    return path.is_file() and path.suffix in (".out", ".log") and path.stat().st_size > 0
