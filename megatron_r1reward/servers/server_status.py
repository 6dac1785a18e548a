"""The state of servers as a file in the run directory, and as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_r1reward.files import read_json, write_text
from megatron_r1reward.servers.member import ServerStatus

_COLUMNS = ("name", "state", "in_flight", "requests", "failures", "restarts", "weight_version", "url")


def write_status(path: Path, rows: Sequence[ServerStatus]) -> None:
    """Replace the status file in one step."""
    write_text(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_status(live_dir: Path) -> list[ServerStatus]:
    """All servers of a run.

    Raises:
        ValueError: the folder holds no status files.
    """
    files = sorted(live_dir.glob("*-servers.json"))
    if not files:
        raise ValueError(f"{live_dir} holds no *-servers.json: give the run directory of a stage with servers")
    return [ServerStatus(**row) for file in files for row in read_json(file)]


def status_table(live_dir: Path) -> str:
    """One line per server, then the last error of those that are not in service."""
    rows = read_status(live_dir)
    cells = [_COLUMNS, *(tuple(str(getattr(row, column)) for column in _COLUMNS) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines += [f"{row.name}: {row.last_error}" for row in rows if row.state != "ready" and row.last_error]
    return "\n".join(lines)
