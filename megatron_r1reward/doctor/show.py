"""The examination as a table or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_r1reward.cluster.placement import Stage
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.doctor.examination import Examination, examine
from megatron_r1reward.doctor.finding import LEVELS, worst
from megatron_r1reward.doctor.run_file import check_run_file, stage_of

_STYLE = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}


def to_json(result: Examination) -> str:
    """`{"place", "build", "worst", "findings": [{"check", "level", "message", "fix", "node"}]}`."""
    tree: dict[str, Any] = {
        "place": result.place,
        "build": result.build,
        "worst": worst(result.findings),
        "findings": [finding.to_json() for finding in result.findings],
    }
    return json.dumps(tree, indent=2)


def show(result: Examination, console: Console) -> None:
    """What is well is one line per check; warnings and errors come last, each with its fix."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in sorted(result.findings, key=lambda finding: LEVELS.index(finding.level)):
        style = _STYLE[finding.level]
        node = f"[{finding.node}] " if finding.node else ""
        table.add_row(f"[{style}]{finding.level}[/]", finding.check, escape(node + finding.message))
        if finding.fix and finding.level != "ok":
            table.add_row("", "", f"[{style}]fix:[/] {escape(finding.fix)}")
    console.print(table)
    counts = Counter(finding.level for finding in result.findings)
    summary = ", ".join(f"{counts[level]} {level}" for level in LEVELS if counts[level])
    console.print(f"[bold]{result.place}, {result.build} environment: {summary}[/]", highlight=False)


def run_doctor(
    folder: Path,
    *,
    run_dir: Path | None,
    as_json: bool,
    quick: bool,
    config: RunConfig | None = None,
    stage: Stage | None = None,
) -> int:
    """Examine and print; returns the exit code: 1 when there is an error, else 0.

    Raises:
        ValueError: `folder` or `run_dir` is not a folder, or the run file `config` does not say which stage it is for.
    """
    inputs = partial(check_run_file, config, stage or stage_of(config)) if config is not None else None
    for path in (folder, *([run_dir] if run_dir is not None else [])):
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder: create it, or name another")
    progress = Console(stderr=True)
    with progress.status("examining") as status:
        result = examine(
            folder.resolve(),
            run_dir=run_dir,
            inputs=inputs,
            announce=lambda group: status.update(f"examining {group}"),
            quick=quick,
        )
    if as_json:
        print(to_json(result))
    else:
        show(result, Console())
    return 1 if worst(result.findings) == "error" else 0
