"""The command line that all recipes share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launching.chain import Task, fail, interpreter, stage_task
from launching.site import read_site
from megatron_r1reward.user_errors import one_line


class Executor(StrEnum):
    local = "local"
    slurm = "slurm"


RunFile = Annotated[Path, typer.Option("--run", metavar="RUN.toml", help="the run file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="applied left to right")]
ExecutorOption = Annotated[Executor, typer.Option(help="this machine, or a Slurm job per task")]
Site = Annotated[Path | None, typer.Option(metavar="SITE.toml", help="[slurm] settings, [slurm.STAGE] for one stage")]
Slurm = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="setting of NeMo-Run's SlurmExecutor, e.g. nodes=4, account=x; repeatable"),
]
Python = Annotated[Path | None, typer.Option(help="interpreter of the tasks; default: .venv of this checkout")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show the scripts and leave")]
Detach = Annotated[bool, typer.Option("--detach", help="Slurm: submit and leave")]
TailLogs = Annotated[bool, typer.Option("--tail-logs", help="copy the tasks' output to this terminal")]


def execute(
    title: str,
    build: Callable[[str, bool], list[Task]],
    *,
    executor: Executor,
    site: Path | None,
    slurm: list[str] | None,
    python: Path | None,
    dry_run: bool,
    detach: bool,
    tail_logs: bool,
) -> None:
    """Build the tasks (arguments: interpreter, local) and run them; ends the program with the exit code."""
    try:
        settings = read_site(site)
        tasks = build(interpreter(python), executor is Executor.local)
        from launching.experiment import Request, run_experiment  # NeMo-Run takes ten seconds to import

        request = Request(
            title=title,
            executor=executor.value,
            site=settings,
            slurm=tuple(slurm or ()),
            dry_run=dry_run,
            detach=detach,
            tail_logs=tail_logs,
        )
        code = run_experiment(tasks, request)
    except (ValueError, OSError) as error:
        code = fail(one_line(error))
    except ModuleNotFoundError as error:
        code = fail(f"{error}: recipes run in their own environment, .venv-recipes/bin/python (make recipes)")
    sys.exit(code)


def stage_command(stage: str, help_text: str) -> typer.Typer:
    """The program of a recipe with a single stage."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command(help=help_text)
    def main(
        run: RunFile,
        overrides: Overrides = None,
        executor: ExecutorOption = Executor.local,
        site: Site = None,
        slurm: Slurm = None,
        python: Python = None,
        dry_run: DryRun = False,
        detach: Detach = False,
        tail_logs: TailLogs = False,
    ) -> None:
        execute(
            f"r1reward-{stage}",
            lambda chosen, local: [stage_task(stage, stage, run, overrides or [], python=chosen, local=local)],
            executor=executor,
            site=site,
            slurm=slurm,
            python=python,
            dry_run=dry_run,
            detach=detach,
            tail_logs=tail_logs,
        )

    return app
