"""Checkpoints between Hugging Face and Megatron, through NeMo-Run.

.venv-recipes/bin/python recipes/convert.py --executor local|slurm -- import|export|verify|inspect ARGUMENTS...
"""

from __future__ import annotations

from typing import Annotated

import typer
from launching.chain import convert_task
from launching.command import Detach, DryRun, Executor, ExecutorOption, Python, Site, Slurm, TailLogs, execute

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help="Checkpoints between Hugging Face and Megatron, through NeMo-Run.")
def main(
    arguments: Annotated[list[str], typer.Argument(help="after --: those of tools/convert_checkpoint.py")],
    executor: ExecutorOption = Executor.local,
    site: Site = None,
    slurm: Slurm = None,
    python: Python = None,
    dry_run: DryRun = False,
    detach: Detach = False,
    tail_logs: TailLogs = False,
) -> None:
    execute(
        "r1reward-convert",
        lambda chosen, local: [convert_task(arguments, python=chosen)],
        executor=executor,
        site=site,
        slurm=slurm,
        python=python,
        dry_run=dry_run,
        detach=detach,
        tail_logs=tail_logs,
    )


if __name__ == "__main__":
    app()
