"""SFT, judge, difficulty, RL and evaluation as one experiment: each stage gets the results of those before it.

.venv-recipes/bin/python recipes/pipeline.py --sft SFT.toml --select EVAL.toml --rl RL.toml --eval EVAL.toml \
    --executor local|slurm [--output-dir DIR] [section.key=value | stage:section.key=value]...
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from launching.chain import pipeline_tasks
from launching.command import (
    Detach,
    DryRun,
    Executor,
    ExecutorOption,
    Overrides,
    Python,
    Site,
    Slurm,
    TailLogs,
    execute,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _stage(text: str) -> typer.models.OptionInfo:
    return typer.Option(metavar="RUN.toml", help=text)


@app.command(help="SFT, judge, difficulty, RL and evaluation as one experiment.")
def main(
    overrides: Overrides = None,
    sft: Annotated[Path | None, _stage("cold start")] = None,
    judge: Annotated[Path | None, _stage("SFT of the consistency judge, beside the cold start")] = None,
    select: Annotated[Path | None, _stage("difficulty of each sample, and the hard set")] = None,
    rl: Annotated[Path | None, _stage("StableReinforce")] = None,
    evaluation: Annotated[Path | None, typer.Option("--eval", metavar="RUN.toml", help="held-out accuracy")] = None,
    output_dir: Annotated[Path | None, typer.Option(help="each stage writes to a folder of its name in it")] = None,
    executor: ExecutorOption = Executor.local,
    site: Site = None,
    slurm: Slurm = None,
    python: Python = None,
    dry_run: DryRun = False,
    detach: Detach = False,
    tail_logs: TailLogs = False,
) -> None:
    given = {"sft": sft, "judge": judge, "select": select, "rl": rl, "eval": evaluation}
    run_files = {stage: path for stage, path in given.items() if path is not None}
    execute(
        "r1reward-pipeline",
        lambda chosen, local: pipeline_tasks(
            run_files, overrides or [], output_dir=output_dir, python=chosen, local=local
        ),
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
