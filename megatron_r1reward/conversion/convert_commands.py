"""`r1reward convert`: Hugging Face folders <-> megatron-core distributed checkpoints, and what to know about them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_r1reward.conversion.weight_source import template_for
from megatron_r1reward.model_folder.other_folder import check_kind
from megatron_r1reward.user_errors import user_errors

if TYPE_CHECKING:
    from megatron_r1reward.conversion.convert import ConversionSummary

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Convert, inspect, verify and merge checkpoints (Hugging Face folders and megatron-core checkpoints).",
)
Out = Annotated[Path, typer.Argument(help="folder to write; must not exist")]
Folder = Annotated[Path, typer.Argument(help="Hugging Face folder or distributed checkpoint")]
Template = Annotated[
    Path | None,
    typer.Option(help="original Hugging Face folder of a training checkpoint; default: the run's model.path"),
]
Dtype = Annotated[str | None, typer.Option(help="of all weights: bfloat16, float16, float32; default: unchanged")]
Threads = Annotated[int | None, typer.Option(help="files written at a time; default: one per core, at most 8")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check names, shapes and sizes; write nothing")]


def _report(out: Path, summary: ConversionSummary, dry_run: bool) -> None:
    verb = "would write" if dry_run else "wrote"
    typer.echo(f"{verb} {out}: {summary.tensors} tensors in {summary.files} files, {summary.bytes / 1e9:.2f} GB")


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder; for --dry-run its config.json is enough")],
    out: Out,
    dtype: Dtype = None,
    threads: Threads = None,
    dry_run: DryRun = False,
) -> None:
    """Hugging Face folder -> distributed checkpoint, which loads under any TP, PP, VPP, CP, EP and DP.

    Interrupted, it goes on where it stopped when it is started again.
    """
    with user_errors(level=logging.WARNING):
        check_kind(folder)
        template_for(folder, without_values=dry_run)  # what is wrong is said before torch is imported: seconds
        from megatron_r1reward.conversion.convert import import_folder

        _report(out, import_folder(folder, out, dtype=dtype, threads=threads, dry_run=dry_run), dry_run)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="distributed checkpoint: imported, or <run>/checkpoints/step-*")],
    out: Out,
    template: Template = None,
    dtype: Dtype = None,
    threads: Threads = None,
    fp8: Annotated[bool, typer.Option("--fp8", help="FP8 weights for serving (compressed-tensors format)")] = False,
    critic: Annotated[bool, typer.Option("--critic", help="PPO's critic in the place of the policy")] = False,
    dry_run: DryRun = False,
) -> None:
    """Distributed checkpoint -> Hugging Face folder with the original's files, names and order."""
    with user_errors(level=logging.WARNING):
        if fp8 and (dtype is not None or dry_run):
            raise ValueError("--fp8 goes with neither --dtype nor --dry-run: leave them out")
        if fp8 and critic:
            raise ValueError("--critic exports what is trained on, and --fp8 what is served: leave one out")
        check_kind(checkpoint)
        template_for(checkpoint, template=template, critic=critic)
        from megatron_r1reward.conversion.convert import export_folder
        from megatron_r1reward.conversion.fp8_export import export_fp8

        if fp8:
            summary = export_fp8(checkpoint, out, template=template, threads=threads)
        else:
            summary = export_folder(
                checkpoint, out, template=template, dtype=dtype, threads=threads, dry_run=dry_run, critic=critic
            )
        _report(out, summary, dry_run)


@app.command()
def inspect(
    folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of lines")] = False
) -> None:
    """What is in it: kind, tensors, bytes, dtypes; of a training checkpoint step, layout, run, score."""
    with user_errors(level=logging.WARNING):
        from megatron_r1reward.conversion.inspect_folder import inspect as look

        check_kind(folder)
        facts = look(folder)
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
            return
        parts: dict[str, Any] = facts.pop("parts")
        for key, value in facts.items():
            typer.echo(f"{key:16}{value}")
        for name, part in sorted(parts.items()):
            typer.echo(
                f"  {name:28}{part['tensors']:7} tensors {part['values'] / 1e6:12.1f} M {part['bytes'] / 1e9:9.3f} GB"
            )


@app.command()
def verify(
    folder: Folder,
    against: Annotated[Path | None, typer.Option(help="folder of either kind that must hold the same bytes")] = None,
    template: Template = None,
    log_probs: Annotated[
        bool, typer.Option("--log-probs", help="compare log-probs with transformers on a sample with an image")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="largest log-prob difference, with --log-probs (float32)")] = 1e-3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
) -> None:
    """Hashes, names, shapes, tied weights; exit code 1 and the tensors' names when something is wrong."""
    with user_errors(level=logging.WARNING):
        check_kind(folder)
        from megatron_r1reward.conversion.verify import verify as check

        problems = 0
        for line in check(folder, against=against, template=template, threads=threads):
            typer.secho(line, fg="red")
            problems += 1
        if log_probs and not problems:
            from megatron_r1reward.conversion.parity import log_prob_difference

            difference = log_prob_difference(folder, against or template)
            typer.echo(f"log-probs: largest difference from transformers {difference:.2e} (float32)")
            problems += difference > tolerance
        typer.echo(f"{folder}: {'intact' if not problems else f'{problems} problems'}")
        if problems:
            raise typer.Exit(1)


@app.command()
def merge(
    out: Annotated[Path, typer.Option(help="Hugging Face folder to write; must not exist")],
    folders: Annotated[list[Path], typer.Argument(help="two or more folders of either kind, of one model")],
    weights: Annotated[str | None, typer.Option(help="e.g. 0.7,0.3; they add up to 1; default: the mean")] = None,
    template: Template = None,
    threads: Threads = None,
) -> None:
    """Weighted sum of several checkpoints, computed in float32."""
    with user_errors(level=logging.WARNING):
        for folder in folders:
            check_kind(folder)
        shares = _shares(weights)
        from megatron_r1reward.conversion.average import merge_folders

        _report(out, merge_folders(folders, out, weights=shares, template=template, threads=threads), False)


def _shares(weights: str | None) -> list[float] | None:
    try:
        return [float(share) for share in weights.split(",")] if weights else None
    except ValueError:
        raise ValueError(f"--weights {weights!r}: give numbers that add up to 1, e.g. 0.7,0.3") from None


@app.command()
def average(
    out: Annotated[Path, typer.Option(help="Hugging Face folder to write; must not exist")],
    folders: Annotated[list[Path], typer.Argument(help="two or more folders of either kind, of one model")],
    template: Template = None,
    threads: Threads = None,
) -> None:
    """The mean of several checkpoints, e.g. the last ones of a run."""
    merge(out=out, folders=folders, weights=None, template=template, threads=threads)
