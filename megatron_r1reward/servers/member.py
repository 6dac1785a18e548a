"""One server as its group sees it: address, state, load and history; and these as a file of the run directory and as a
table."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from megatron_r1reward.files import read_json, write_text

Report = Callable[[str], None]  # takes a line for the user

# starting -> ready <-> quarantined -> restarting -> quarantined; retired is final
State = Literal["starting", "ready", "quarantined", "restarting", "retired"]
_COLUMNS = ("name", "state", "in_flight", "requests", "failures", "restarts", "weight_version", "url")


class ServerError(RuntimeError):
    """A server did not start, or died. The message names the log and ends with its last lines."""


class Server(Protocol):
    """A server that is ours to start again: a child of this process (`VllmServer`) or a job step of the life that it is
    part of (`ComponentServer`)."""

    @property
    def url(self) -> str: ...

    @property
    def token(self) -> str | None: ...

    @property
    def alive(self) -> bool:
        """False once its process has ended."""

    def restart(self, reason: str = "") -> None:
        """End what is left of it, even if it hangs, and start a new one; returns at once."""

    def wait_ready(self) -> None:
        """Block until the new one has completed a request. ServerError when it did not."""

    def stop(self, *, grace_s: float = ...) -> None:
        """End it; its memory is free when this returns."""

    def give_up(self, reason: str) -> None:
        """It will not be started again."""

    def close(self) -> None:
        """Nobody needs it any more; whoever waits in `wait_ready` leaves."""


@dataclass(frozen=True, kw_only=True)
class ServerStatus:
    """What `r1reward servers`, metrics and the log show of one server."""

    name: str
    url: str
    state: State
    in_flight: int
    requests: int  # answered
    failures: int  # requests that were not, and missed health checks
    restarts: int
    weight_version: int | None  # None: weights that are never pushed, or not yet
    last_error: str


@dataclass(kw_only=True, eq=False)
class Member:
    """Belongs to the event loop of its group: no locks.

    `server` is None for a server that somebody else started; it is probed until it works again, never restarted.
    """

    name: str
    fixed_url: str = ""  # of a server that is not ours
    token: str | None = None
    server: Server | None = None
    state: State = "starting"
    incarnation: int = 0  # counts the lives of its process
    requests: int = 0
    failures: int = 0
    failures_in_a_row: int = 0
    missed_health_checks: int = 0
    passed_health_checks: int = 0  # in a row, without a failed request
    restarts: int = 0
    restarts_in_a_row: int = 0
    last_error: str = ""
    weight_version: int | None = None
    must_be_pushed: bool = False  # it may hold a mixture of weights and is paused
    waits_for_weights: bool = False  # it is well, but nobody has the current weights at hand
    in_flight: set[asyncio.Task[object]] = field(default_factory=set)
    outstanding: int = 0

    @property
    def url(self) -> str:
        return self.server.url if self.server is not None else self.fixed_url

    @property
    def bearer_token(self) -> str | None:
        return self.server.token if self.server is not None else self.token

    def withdraw(self) -> None:
        """Cancel what is in flight there: it is asked elsewhere."""
        for task in tuple(self.in_flight):
            task.cancel()

    def status(self) -> ServerStatus:
        return ServerStatus(
            name=self.name,
            url=self.url,
            state=self.state,
            in_flight=self.outstanding,
            requests=self.requests,
            failures=self.failures,
            restarts=self.restarts,
            weight_version=self.weight_version,
            last_error=self.last_error,
        )


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
