"""`r1reward data`: build, import and inspect preference data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_r1reward.run_files import Overrides, RunFile
from megatron_r1reward.user_errors import user_errors

app = typer.Typer(no_args_is_help=True, help="Build, import and inspect preference data.")


@app.command("digits")
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
    pointwise: Annotated[bool, typer.Option("--pointwise", help="also a cold start of ratings")] = False,
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
            pointwise=pointwise,
        )
        typer.echo(f"{out}: {summary.rows}, {summary.images} images; see {out / 'README.md'}")


@app.command("inspect")
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

        if stage not in ("rl", "annotate", "eval"):
            raise ValueError(f"--stage {stage!r}: give rl, annotate or eval")
        config = None if run_file is None else load_config(run_file)
        for one in (source, *(against or ())):
            _check(one)
        from megatron_r1reward.data.stage_data import RowLimits
        from megatron_r1reward.report.inspecting import inspect_source

        limits = None if config is None else RowLimits.of(config, stage)  # type: ignore[arg-type]
        inspect_source(
            source, out, schema=schema, image_root=image_root, split=split, rows=rows, limits=limits,
            against=against or (),
        )  # fmt: skip
        typer.echo(f"wrote {out}")


@app.command("sft")
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

        config = load_config(run_file, overrides or [])
        attempts = config.run.output_dir / "attempts.jsonl"
        if not attempts.is_file():
            raise ValueError(f"{attempts} does not exist: run `r1reward annotate` with the same run file first")
        from megatron_r1reward.evaluation.cold_start_set import ReasoningFilter
        from megatron_r1reward.launch.stages import write_cold_start

        keep = ReasoningFilter(min_characters=min_characters, max_characters=max_characters, script=script)
        built = write_cold_start(config, out, keep=keep, judged=judge)
        typer.echo(f"{out / 'sft.jsonl'}: {len(built.rows)} rows; {dict(built.counts)}")


@app.command("import")
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
        if order not in ("auto", "drawn", "stored"):
            raise ValueError(f"--order {order!r}: give auto, drawn or stored")
        for one in (source, *(remove_overlap_with or ())):
            _check(one)
        from megatron_r1reward.data.importing import import_preferences
        from megatron_r1reward.files import write_bytes
        from megatron_r1reward.report.balance_chart import balance_svg

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


def _check(source: str) -> None:
    """ValueError where there is nothing to read, before anything is imported for it."""
    from megatron_r1reward.data.rows import check_source, is_hub_id

    if not is_hub_id(source):
        check_source(Path(source))
