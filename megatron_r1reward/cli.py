"""`r1reward`: each subcommand reads its arguments, hands over to a stage, and turns user errors into one line."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from megatron_r1reward.cluster.placement import ServerKind, Stage
from megatron_r1reward.conversion.cli import app as convert_app
from megatron_r1reward.hub.hub_commands import app as hub_app
from megatron_r1reward.processes import quick_exit, quick_imports
from megatron_r1reward.run_dir import EXIT_REQUEUE, RunDir
from megatron_r1reward.use_commands import bench, calibrate, score, serve, serve_labels
from megatron_r1reward.user_errors import user_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(no_args_is_help=True, help="Build, import and inspect preference data.")
app.add_typer(data_app, name="data")
app.add_typer(convert_app, name="convert")
app.add_typer(hub_app, name="hub")
for command in (bench, calibrate, score, serve, serve_labels):
    app.command()(command)


def shipped() -> Path:
    """The folder with recipes/, slurm/ and tools/: of the checkout, or of the wheel."""
    package = Path(__file__).parent
    return package / "shipped" if (package / "shipped").is_dir() else package.parent


def _here_or_shipped(path: Path) -> Path:
    """`recipes/...` means the shipped one where there is none of that name."""
    ours = shipped() / path
    return ours if not path.exists() and path.parts[:1] == ("recipes",) and ours.exists() else path


RunFile = Annotated[
    Path, typer.Argument(metavar="RUN.toml", help="the run file; recipes/... are shipped", callback=_here_or_shipped)
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="applied left to right")]


def _run_stage(stage: Stage, run_file: Path, overrides: list[str] | None) -> None:
    """Load the run file and run one of the functions of `launch.stages`, imported only now: it takes seconds."""
    with user_errors():
        from megatron_r1reward.config.load import load_config
        from megatron_r1reward.launch.launch import launch as launch_stage
        from megatron_r1reward.launch.launch import needs_supervisor

        config = load_config(run_file, overrides or [])
        if needs_supervisor(config, stage):
            raise typer.Exit(launch_stage(stage, run_file, overrides or [], local=True))
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
        from megatron_r1reward.planner.show_plan import run_plan

        if stage not in (None, "sft", "rl"):
            raise ValueError(f"--stage {stage!r}: give sft or rl")
        fits = run_plan(load_config(run_file, overrides or []), stage=stage, json_path=json_path)  # type: ignore[arg-type]
        raise typer.Exit(0 if fits else 1)


@app.command()
def servers(run_dir: Annotated[Path, typer.Argument(help="run directory of a stage")]) -> None:
    """State of each rollout and judge server of a running stage."""
    with user_errors():
        from megatron_r1reward.servers.server_status import status_table

        typer.echo(status_table(run_dir / "live"))


@data_app.command("digits")
def data_digits(
    out: Annotated[Path, typer.Option(help="folder to write")],
    seed: int = 0,
    sft_rows: int = 8000,
    pool_rows: int = 4000,
    heldout_pairs: int = 480,
    judge_rows: int = 4000,
    categories: Annotated[str | None, typer.Option(help="kinds of question, comma-separated; default: all")] = None,
    annotator_error_rate: Annotated[float, typer.Option(help="share of reasonings for the wrong response")] = 0.0,
    unlabelled_pairs: Annotated[int, typer.Option(help="of two wrong, and as many of two near-equal responses")] = 0,
) -> None:
    """Preferences over real handwritten digits (ships with scikit-learn)."""
    with user_errors():
        from megatron_r1reward.demo.digits import build_digits
        from megatron_r1reward.demo.digits_text import CATEGORIES

        summary = build_digits(
            out,
            seed=seed,
            sft_rows=sft_rows,
            pool_rows=pool_rows,
            heldout_pairs=heldout_pairs,
            judge_rows=judge_rows,
            categories=categories.split(",") if categories else CATEGORIES,
            annotator_error_rate=annotator_error_rate,
            unlabelled_pairs=unlabelled_pairs,
        )
        typer.echo(f"{out}: {summary.rows}, {summary.images} images; see {out / 'README.md'}")


@data_app.command("inspect")
def data_inspect(
    source: Annotated[str, typer.Argument(help="file, folder or pattern of files, or a data set's id on the Hub")],
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("inspect.html"),
    schema: Annotated[str, typer.Option(help="as in `data import`")] = "auto",
    image_root: Annotated[Path | None, typer.Option(help="relative image paths are below it")] = None,
    split: Annotated[str, typer.Option(help="of a data set on the Hub")] = "train",
    rows: Annotated[int, typer.Option(help="rows to show", min=1)] = 20,
    run_file: Annotated[Path | None, typer.Option(help="count tokens by its model, pixels and limits")] = None,
    stage: Annotated[str, typer.Option(help="whose limits: rl, annotate or eval")] = "rl",
    against: Annotated[list[str] | None, typer.Option(help="a benchmark or other set to look for the rows in")] = None,
) -> None:
    """Figures of a preference data set, and rows as the model will read them, in one HTML file and here."""
    with user_errors():
        from megatron_r1reward.config.load import load_config
        from megatron_r1reward.data.stage_data import RowLimits
        from megatron_r1reward.report.inspecting import inspect_source

        if stage not in ("rl", "annotate", "eval"):
            raise ValueError(f"--stage {stage!r}: give rl, annotate or eval")
        limits = None if run_file is None else RowLimits.of(load_config(run_file), stage)  # type: ignore[arg-type]
        inspect_source(
            source, out, schema=schema, image_root=image_root, split=split, rows=rows, limits=limits,
            against=against or (),
        )  # fmt: skip
        typer.echo(f"wrote {out}")


@data_app.command("sft")
def data_sft(
    run_file: RunFile,
    out: Annotated[Path, typer.Option(help="folder to write")],
    overrides: Overrides = None,
    judge: Annotated[bool, typer.Option("--judge", help="keep what the judge of [judge] calls consistent")] = False,
    min_characters: Annotated[int, typer.Option(help="shortest reasoning")] = 0,
    max_characters: Annotated[int | None, typer.Option(help="longest reasoning")] = None,
    script: Annotated[str | None, typer.Option(help="script of most letters, e.g. latin")] = None,
) -> None:
    """The cold-start set: the first right reasoning of each preference that `annotate` (same run file) collected."""
    with user_errors():
        from megatron_r1reward.config.load import load_config
        from megatron_r1reward.evaluation.cold_start_set import ReasoningFilter
        from megatron_r1reward.launch.stages import write_cold_start

        keep = ReasoningFilter(min_characters=min_characters, max_characters=max_characters, script=script)
        built = write_cold_start(load_config(run_file, overrides or []), out, keep=keep, judged=judge)
        typer.echo(f"{out / 'sft.jsonl'}: {len(built.rows)} rows; {dict(built.counts)}")


@data_app.command("import")
def data_import(
    source: Annotated[str, typer.Argument(help="file, folder or pattern of files, or a data set's id on the Hub")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    schema: Annotated[str, typer.Option(help="auto, or the name of a published schema (docs/data.md)")] = "auto",
    image_root: Annotated[Path | None, typer.Option(help="relative image paths are below it")] = None,
    image_roots: Annotated[list[Path] | None, typer.Option(help="a further folder that images may be in")] = None,
    split: Annotated[str, typer.Option(help="of a data set on the Hub")] = "train",
    order: Annotated[str, typer.Option(help="of the two responses: auto, drawn or stored")] = "auto",
    seed: Annotated[int, typer.Option(help="of the drawn order")] = 0,
    processes: Annotated[int | None, typer.Option(help="that read and decode; default: a core each, 8 at most")] = None,
    max_frames: Annotated[int, typer.Option(help="of a video, evenly spaced", min=1)] = 32,
    remove_duplicates: Annotated[bool, typer.Option(help="set aside pairs that occur again")] = False,
    remove_near_duplicates: Annotated[bool, typer.Option(help="set aside pairs one word from an earlier one")] = False,
    remove_overlap_with: Annotated[
        list[str] | None, typer.Option(help="a benchmark; rows with a question of its are set aside; repeatable")
    ] = None,
) -> None:
    """Check a preference data set, write embedded images to files and bad rows to a quarantine file."""
    with user_errors():
        from megatron_r1reward.data.importing import import_preferences
        from megatron_r1reward.files import write_bytes
        from megatron_r1reward.report.balance_chart import balance_svg

        if order not in ("auto", "drawn", "stored"):
            raise ValueError(f"--order {order!r}: give auto, drawn or stored")
        result = import_preferences(
            source,
            out,
            schema=schema,
            image_root=image_root,
            image_roots=image_roots or (),
            split=split,
            order=order,  # type: ignore[arg-type]  # checked above
            seed=seed,
            processes=processes or min(8, len(os.sched_getaffinity(0))),
            max_frames=max_frames,
            remove_duplicates=remove_duplicates,
            remove_near_duplicates=remove_near_duplicates,
            remove_overlap_with=remove_overlap_with or (),
        )
        typer.echo(f"{out}: {result.rows} usable rows, {result.quarantined} quarantined")
        write_bytes(out / "balance.svg", balance_svg(result.account["balance"]))
        typer.echo(f"schema, order and counts: {out / 'import.json'}; a picture: {out / 'balance.svg'}")
        if result.quarantine_path is not None:
            typer.echo(f"reasons: {result.quarantine_path}")


@app.command()
def tiny(
    out: Annotated[Path, typer.Option(help="folder to write")],
    corpus: Annotated[list[Path], typer.Option(help="JSONL files whose texts train the tokenizer")],
    seed: int = 0,
) -> None:
    """Write a tiny Qwen2.5-VL (about a million parameters) as a Hugging Face folder."""
    with user_errors():
        from megatron_r1reward.demo.pipeline import write_demo_model

        write_demo_model(out, corpus, seed=seed)
        typer.echo(f"wrote {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="run directory")] = Path("runs/demo"),
    run_files: Annotated[
        Path, typer.Option(help="folder with the stages' run files", callback=_here_or_shipped)
    ] = Path("recipes/demo"),
    seed: Annotated[int, typer.Option(min=0, help="of the data, the tiny model and every stage")] = 0,
) -> None:
    """The whole pipeline on this machine: data, SFT, judge, annotation, RL, evaluation, report."""
    with user_errors():
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
        if not run_dir.is_dir():
            raise ValueError(f"{run_dir} is not a folder: name the directory that holds the stages of a run")
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
        from megatron_r1reward.doctor.show import run_doctor

        if run_file is None and (overrides or stage is not None):
            raise ValueError("overrides and --stage belong to a run file: name it with --run-file")
        config = load_config(run_file, overrides or []) if run_file is not None else None
        code = run_doctor(folder, run_dir=run_dir, as_json=json_output, quick=quick, config=config, stage=stage)
        raise typer.Exit(code)


def main() -> None:
    with quick_exit():
        app()


if __name__ == "__main__":
    main()
