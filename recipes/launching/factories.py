"""NeMo-Run's own objects: executors and tasks. The factories are also usable by name from NeMo-Run's command line.

Annotations stay objects here: NeMo-Run evaluates those of a factory in a namespace of its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemo_run as run

from launching.chain import Task, interpreter, stage_task
from launching.site import field_names, settings_of

# Nothing is copied: the checkout lies on the shared file system, and the job runs there (see `Task.script`).
_FIXED = {"poll_estimated_start_time": False, "job_name_prefix": "r1reward-"}


def _settings(stage: str, site: dict[str, Any], options: Sequence[str]) -> dict[str, Any]:
    settings = settings_of(stage, site, options, field_names(run.SlurmExecutor))
    if "account" not in settings:
        raise ValueError('no account: give --slurm account=NAME, or account = "NAME" under [slurm] in the site file')
    return {**_FIXED, **settings}


def slurm_executor(stage: str, site: dict[str, Any], options: Sequence[str]) -> run.SlurmExecutor:
    """A job of this cluster, submitted from here. ValueError for settings that cannot be used."""
    return run.SlurmExecutor(
        tunnel=run.LocalTunnel(job_dir=""), packager=run.Packager(), **_settings(stage, site, options)
    )


def script(task: Task, **arguments: Any) -> run.Script:
    """The task for `Experiment.add`; arguments as for `Task.script`."""
    return run.Script(inline=task.script(**arguments))


@run.cli.factory
def local_machine() -> run.Config[run.LocalExecutor]:
    """This machine."""
    return run.Config(run.LocalExecutor)


@run.cli.factory
def slurm_job(account: str, partition: str | None = None, nodes: int = 1) -> run.Config[run.SlurmExecutor]:
    """A job of this cluster; further settings as `run.executor.gpus_per_node=8`."""
    options = [f"account={account}", f"nodes={nodes}", *([f"partition={partition}"] if partition else [])]
    return run.Config(
        run.SlurmExecutor,
        tunnel=run.Config(run.LocalTunnel, job_dir=""),
        packager=run.Config(run.Packager),
        **_settings("", {}, options),
    )


@run.cli.factory
def stage_script(
    stage: str, run_file: str, overrides: list[str] | None = None, python: str | None = None
) -> run.Config[run.Script]:
    """One stage by its name in `r1reward launch`: sft, rl, eval, annotate, judge."""
    chosen = interpreter(Path(python) if python else None)
    task = stage_task(stage, stage, Path(run_file), overrides or [], python=chosen, local=False)
    return run.Config(run.Script, inline=task.script())
