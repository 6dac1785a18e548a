"""NeMo-Run's own objects: executors and tasks. Also usable by name from NeMo-Run's command line.

Annotations stay objects here: NeMo-Run evaluates those of a factory in a namespace of its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nemo_run as run

from launching.chain import Task, interpreter, stage_task
from launching.site import field_names, settings_of


@run.cli.factory
@run.autoconvert
def local_executor() -> run.LocalExecutor:
    """This machine."""
    return run.LocalExecutor()


def slurm_executor(stage: str, site: dict[str, Any], options: Sequence[str]) -> run.SlurmExecutor:
    """A job of this cluster, submitted from here. ValueError for settings that cannot be used."""
    settings = settings_of(stage, site, options, field_names(run.SlurmExecutor))
    if "account" not in settings:
        raise ValueError('no account: give --slurm account=NAME, or account = "NAME" under [slurm] in the site file')
    return run.SlurmExecutor(
        # Nothing is copied: the checkout lies on the shared file system, and the job runs there.
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
        **{"poll_estimated_start_time": False, "job_name_prefix": "r1reward-", **settings},
    )


@run.cli.factory
@run.autoconvert
def slurm_job(account: str, stage: str = "rl", nodes: int = 1, partition: str | None = None) -> run.SlurmExecutor:
    """The same for NeMo-Run's command line: `run.executor=slurm_job run.executor.account=...`."""
    options = [f"account={account}", f"nodes={nodes}"] + ([f"partition={partition}"] if partition else [])
    return slurm_executor(stage, {}, options)


def script(task: Task, **arguments: Any) -> run.Script:
    """The task for `Experiment.add`; arguments as for `Task.script`."""
    return run.Script(inline=task.script(**arguments))


@run.cli.factory
@run.autoconvert
def stage_script(
    stage: str, run_file: str, overrides: list[str] | None = None, python: str | None = None
) -> run.Script:
    """One stage by the name of `r1reward launch`: sft, rl, eval, annotate."""
    chosen = interpreter(Path(python) if python else None)
    return script(stage_task(stage, stage, Path(run_file), overrides or [], python=chosen, local=False))
