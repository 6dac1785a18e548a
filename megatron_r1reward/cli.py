"""`r1reward`: each subcommand reads its arguments, hands over to a stage, and turns user errors into one line."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
data_app = typer.Typer(no_args_is_help=True, help="Build, import and inspect preference data.")
app.add_typer(data_app, name="data")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="the run file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...", help="applied left to right")]


@contextmanager
def _user_errors() -> Iterator[None]:
    """ValueError is the user's to fix: one message without a traceback, exit code 2."""
    # One voice: the other ranks speak up only when something is wrong.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "httpx2", "megatron"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Notices of torch, transformers and megatron-core about their own future, none of them for users of this program.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|megatron|transformers)\b.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron_r1reward\.parallel\.cpu")
    try:
        yield
    except ValueError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from error


def _run_stage(stage: str, run_file: Path, overrides: list[str] | None) -> None:
    """Load the run file and run one of the functions of `launch.stages`, imported only now: it takes seconds."""
    with _user_errors():
        from megatron_r1reward.config.load import load_config
        from megatron_r1reward.launch.local import run_local_ranks, under_a_launcher

        config = load_config(run_file, overrides or [])
        if stage in ("sft", "rl") and config.run.local_ranks > 1 and not under_a_launcher():
            raise typer.Exit(run_local_ranks([stage, str(run_file), *(overrides or [])], config.run.local_ranks))
        from megatron_r1reward.launch import stages

        {"sft": stages.sft, "annotate": stages.annotate, "rl": stages.rl, "eval": stages.evaluate}[stage](config)


@app.command()
def sft(run_file: RunFile, overrides: Overrides = None) -> None:
    """Stage 1: long chain-of-thought cold start."""
    _run_stage("sft", run_file, overrides)


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
def serve(run_file: RunFile, overrides: Overrides = None) -> None:
    """The released remote-reward protocol (POST /get_reward_mllm) for the original training code."""
    with _user_errors():
        from megatron_r1reward.config.load import load_config
        from megatron_r1reward.launch.serve import serve as run_service

        run_service(load_config(run_file, overrides or []))


@app.command()
def servers(run_dir: Annotated[Path, typer.Argument(help="run directory of a stage")]) -> None:
    """State of each rollout and judge server of a running stage."""
    with _user_errors():
        from megatron_r1reward.rollout.status import status_table

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
) -> None:
    """Preferences over real handwritten digits (ships with scikit-learn)."""
    with _user_errors():
        from megatron_r1reward.data.digits import build_digits
        from megatron_r1reward.data.digits_text import CATEGORIES

        summary = build_digits(
            out,
            seed=seed,
            sft_rows=sft_rows,
            pool_rows=pool_rows,
            heldout_pairs=heldout_pairs,
            judge_rows=judge_rows,
            categories=categories.split(",") if categories else CATEGORIES,
        )
        typer.echo(f"{out}: {summary.rows}, {summary.images} images; see {out / 'README.md'}")


@data_app.command("import")
def data_import(
    source: Annotated[Path, typer.Argument(help="JSONL, Parquet file or folder, or saved datasets folder")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    image_root: Annotated[Path | None, typer.Option(help="relative image paths are below it")] = None,
) -> None:
    """Check a preference data set, write embedded images to files and bad rows to a quarantine file."""
    with _user_errors():
        from megatron_r1reward.data.importing import import_preferences

        result = import_preferences(source, out, image_root=image_root)
        typer.echo(f"{out}: {len(result.preferences)} usable rows, {result.quarantined} quarantined")
        if result.quarantine_path is not None:
            typer.echo(f"reasons: {result.quarantine_path}")


@app.command()
def tiny(
    out: Annotated[Path, typer.Option(help="folder to write")],
    corpus: Annotated[list[Path], typer.Option(help="JSONL files whose texts train the tokenizer")],
    seed: int = 0,
) -> None:
    """Write a tiny Qwen2.5-VL (about a million parameters) as a Hugging Face folder."""
    with _user_errors():
        from megatron_r1reward.launch.demo import write_demo_model

        write_demo_model(out, corpus, seed=seed)
        typer.echo(f"wrote {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="run directory")] = Path("runs/demo"),
    run_files: Annotated[Path, typer.Option(help="folder with the stages' run files")] = Path("recipes/demo"),
) -> None:
    """The whole pipeline on this machine: data, SFT, judge, annotation, RL, evaluation, report."""
    with _user_errors():
        from megatron_r1reward.launch.demo import run_demo

        run_demo(out, run_files)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="directory with the stages of one run")]) -> None:
    """Write report.html and report.json from a finished run."""
    with _user_errors():
        from megatron_r1reward.evaluation.report import build_report

        build_report(run_dir)
        typer.echo(f"wrote {run_dir / 'report.html'} and {run_dir / 'report.json'}")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
