"""`r1reward`: each subcommand reads its arguments, hands over to a stage, and turns user errors into one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from megatron_r1reward.cluster.placement import ServerKind, Stage
from megatron_r1reward.conversion.convert_commands import app as convert_app
from megatron_r1reward.data_commands import app as data_app
from megatron_r1reward.hub.hub_commands import app as hub_app
from megatron_r1reward.processes import quick_imports, run_program
from megatron_r1reward.run_dir import EXIT_REQUEUE, RunDir
from megatron_r1reward.run_files import Overrides, RunFile, here_or_shipped, shipped
from megatron_r1reward.use_commands import bench, calibrate, score, serve, serve_labels
from megatron_r1reward.user_errors import check_file, user_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(hub_app, name="hub")
for command in (bench, calibrate, score, serve, serve_labels):
    app.command()(command)


def _run_stage(stage: Stage, run_file: Path, overrides: list[str] | None) -> None:
    """Check the run file and what it names, then run one of the functions of `launch.stages`, imported only then: it
    takes seconds."""
    with user_errors():
        from megatron_r1reward.config.load import load_config

        config = load_config(run_file, overrides or [])
        from megatron_r1reward.launch.launch import launch as launch_stage
        from megatron_r1reward.launch.launch import needs_supervisor
        from megatron_r1reward.launch.stage_models import check_models

        if needs_supervisor(config, stage):
            raise typer.Exit(launch_stage(stage, run_file, overrides or [], local=True))
        check_models(config, stage)
        with quick_imports():
            if stage in ("sft", "rm"):
                from megatron_r1reward.launch.trainer_ranks import train
            else:
                from megatron_r1reward.launch.stages import annotate, evaluate, rl

        if stage in ("annotate", "eval"):
            (annotate if stage == "annotate" else evaluate)(config)
        else:
            # A request that stopped an earlier run must not stop this one. A supervisor empties live/.
            RunDir(root=config.run.output_dir).stop.unlink(missing_ok=True)
            if not (train(config, stage) if stage in ("sft", "rm") else rl(config)):
                raise typer.Exit(EXIT_REQUEUE)


@app.command()
def sft(run_file: RunFile, overrides: Overrides = None) -> None:
    """Stage 1: long chain-of-thought cold start."""
    _run_stage("sft", run_file, overrides)


@app.command()
def rm(run_file: RunFile, overrides: Overrides = None) -> None:
    """A scalar reward model: a Bradley-Terry head on the same backbone, trained on the same pairs."""
    _run_stage("rm", run_file, overrides)


@app.command()
def annotate(run_file: RunFile, overrides: Overrides = None) -> None:
    """Difficulty: up to 3 attempts per sample at an OpenAI-compatible endpoint; writes the hard set for RL."""
    _run_stage("annotate", run_file, overrides)


@app.command()
def rl(run_file: RunFile, overrides: Overrides = None) -> None:
    """Stage 2: StableReinforce on the hard set."""
    _run_stage("rl", run_file, overrides)


@app.command("eval")
def evaluate(run_file: RunFile, overrides: Overrides = None) -> None:
    """Held-out accuracy in both answer orders, voting@K, any-correct@K."""
    _run_stage("eval", run_file, overrides)


@app.command()
def launch(
    stage: Annotated[Stage, typer.Argument(help="sft, rm, rl, eval, annotate, judge or serve")],
    run_file: RunFile,
    overrides: Overrides = None,
    local: Annotated[bool, typer.Option(help="processes of this machine, also inside a Slurm job")] = False,
) -> None:
    """One stage with all its components under a supervisor: job steps in a Slurm job, processes elsewhere."""
    with user_errors():
        from megatron_r1reward.launch.launch import launch as launch_stage

        raise typer.Exit(launch_stage(stage, run_file, overrides or [], local=local))


@app.command(hidden=True)
def worker(stage: Stage, run_file: RunFile, overrides: Overrides = None) -> None:
    """One task of a supervised stage's driver."""
    with user_errors(component=True):
        from megatron_r1reward.config.load import load_config
        from megatron_r1reward.launch.step_main import allow_stack_dumps, run_driver

        allow_stack_dumps()
        run_driver(load_config(run_file, overrides or []), stage)


@app.command(hidden=True)
def server(
    stage: Stage,
    kind: ServerKind,
    index: int,
    run_file: RunFile,
    overrides: Overrides = None,
    life: int = 0,
    start: int = 0,
) -> None:
    """One server of a supervised stage."""
    with user_errors(component=True):
        from megatron_r1reward.config.load import load_config
        from megatron_r1reward.launch.step_main import allow_stack_dumps, run_server

        allow_stack_dumps()
        config = load_config(run_file, overrides or [])
        raise typer.Exit(run_server(config, stage, kind, index, life=life, start=start))


@app.command()
def plan(
    run_file: RunFile,
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="sft or rl; default: the section that the run file has")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the plan there; - prints it instead")] = None,
) -> None:
    """Memory, communication and predicted time before any GPU is spent; exit code 1 where the run does not fit."""
    with user_errors():
        from megatron_r1reward.config.load import load_config

        if stage not in (None, "sft", "rl"):
            raise ValueError(f"--stage {stage!r}: give sft or rl")
        config = load_config(run_file, overrides or [])
        from megatron_r1reward.planner.catalog import check_model
        from megatron_r1reward.planner.show_plan import run_plan

        check_model(config.model.path, config.plan.model)
        fits = run_plan(config, stage=stage, json_path=json_path)  # type: ignore[arg-type]
        raise typer.Exit(0 if fits else 1)


@app.command()
def servers(run_dir: Annotated[Path, typer.Argument(help="run directory of a stage")]) -> None:
    """State of each rollout and judge server of a running stage."""
    with user_errors():
        from megatron_r1reward.servers.member import status_table

        typer.echo(status_table(RunDir(root=run_dir).live))


@app.command()
def tiny(
    out: Annotated[Path, typer.Option(help="folder to write")],
    corpus: Annotated[list[Path], typer.Option(help="JSONL files whose texts train the tokenizer")],
    seed: int = 0,
) -> None:
    """Write a tiny Qwen2.5-VL (about a million parameters) as a Hugging Face folder."""
    with user_errors():
        for path in corpus:
            check_file(path)
        from megatron_r1reward.demo.pipeline import write_demo_model

        write_demo_model(out, corpus, seed=seed)
        typer.echo(f"wrote {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="run directory")] = Path("runs/demo"),
    run_files: Annotated[Path, typer.Option(help="folder with the stages' run files", callback=here_or_shipped)] = Path(
        "recipes/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="of the data, the tiny model and every stage")] = 0,
) -> None:
    """The whole pipeline on this machine: data, SFT, judge, annotation, RL, evaluation, report."""
    with user_errors():
        if not run_files.is_dir():
            raise ValueError(f"--run-files {run_files} is not a folder: name the one with the stages' run files")
        from megatron_r1reward.demo.pipeline import run_demo

        run_demo(out, run_files, seed=seed)


@app.command()
def recipes(
    out: Annotated[Path | None, typer.Option(help="copy recipes/, slurm/ and tools/ to this new folder")] = None,
) -> None:
    """The run files that come with this program; with --out, a copy to edit, with the job scripts."""
    with user_errors():
        if out is None:
            for path in sorted((shipped() / "recipes").rglob("*.toml")):
                typer.echo(path.relative_to(shipped()))
            return
        for folder in ("recipes", "slurm", "tools"):
            shutil.copytree(shipped() / folder, out / folder, ignore=shutil.ignore_patterns("__pycache__", "site.sh"))
        typer.echo(f"wrote {out}")


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="directory with the stages of one run")]) -> None:
    """Write report.html and report.json from a finished run."""
    with user_errors():
        from megatron_r1reward.report.inputs import check_complete

        check_complete(run_dir)
        from megatron_r1reward.report.report import build_report

        build_report(run_dir)
        typer.echo(f"wrote {run_dir / 'report.html'} and {run_dir / 'report.json'}")


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(help="run.output_dir of a stage")],
    json_output: Annotated[bool, typer.Option("--json", help="JSON on standard output")] = False,
) -> None:
    """What a run is doing, its last metrics, how long it still takes, and why it stopped; from its files alone."""
    with user_errors():
        from megatron_r1reward.status.status_page import run_status

        raise typer.Exit(run_status(run_dir, as_json=json_output))


@app.command()
def doctor(
    overrides: Overrides = None,
    run_file: Annotated[Path | None, typer.Option(help="also examine the inputs of this run file's stage")] = None,
    stage: Annotated[Stage | None, typer.Option(help="of --run-file; default: the section that it has")] = None,
    folder: Annotated[Path, typer.Option(help="a folder on the file system that runs will use")] = Path("."),
    run_dir: Annotated[Path | None, typer.Option(help="also ask the servers of this run")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="JSON on standard output")] = False,
    quick: Annotated[bool, typer.Option(help="do not import torch, vLLM and megatron-core")] = False,
) -> None:
    """Is this machine or cluster fit? Names every problem and its fix; exit code 1 when a stage would fail."""
    with user_errors():
        from megatron_r1reward.config.load import load_config

        if run_file is None and (overrides or stage is not None):
            raise ValueError("overrides and --stage belong to a run file: name it with --run-file")
        config = load_config(run_file, overrides or []) if run_file is not None else None
        from megatron_r1reward.doctor.examination import run_doctor

        code = run_doctor(folder, run_dir=run_dir, as_json=json_output, quick=quick, config=config, stage=stage)
        raise typer.Exit(code)


def main() -> None:
    run_program(app)


if __name__ == "__main__":
    main()
