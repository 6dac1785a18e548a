"""The files of a run directory through which supervisor, trainer, servers and `r1reward status` talk to each other.

    RUN/config.toml                    resolved configuration                                      (trainer)
    RUN/logs-<life>/supervisor.log     what the supervisor did and why                             (supervisor)
    RUN/logs-<life>/<component>.log    "trainer", "rollout-0", "judge-0", ...                      (each component)
    RUN/logs-<life>/<server>.vllm.log  vLLM's own words                                            (each server)
    RUN/logs-<life>/<component>.srun.log  what srun had to say about the step                      (supervisor, Slurm)
    RUN/logs-<life>/exit.json          how that life ended: `ExitReport`                           (supervisor)
    RUN/metrics.jsonl                  one row per step                                            (trainer)
    RUN/checkpoints/                   step-<N>/ and latest                                        (trainer)
    RUN/live/run.json                  who runs here now, where, until when: `RunInfo`             (supervisor)
    RUN/live/<component>.step          "<job>.<step>" of Slurm or "pid <n>", plain text            (each component)
    RUN/live/<component>.address.json  where a ready server listens: `Address`                     (each server)
    RUN/live/<kind>-servers.json       state of each server, for `r1reward servers`                (who uses servers)
    RUN/live/<server>.end.json         the server ended, and how: `ServerEnd`                      (supervisor)
    RUN/live/<server>.order.json       start it again, end it, give it up: `ServerOrder`           (who uses servers)
    RUN/live/trainer.heartbeat.json    progress: `Heartbeat`                                       (trainer's main rank)
    RUN/live/stop.json                 "save and stop after this step": `StopRequest`              (anybody)
    RUN/DONE                           the stage has finished                                      (trainer)
    RUN/exit.json                      how the last life ended: a copy of its exit.json            (supervisor)

A life is one start of the stage in this directory: the first is 0; a requeued or resubmitted job is the next one.
`live/` is emptied when a life begins. Every JSON file appears whole or not at all; times are seconds since the epoch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from megatron_r1reward.files import write_text

EXIT_DONE = 0
EXIT_REQUEUE = 75  # stopped on request after saving; start the same command again to continue (sysexits' EX_TEMPFAIL)

Launcher = Literal["local", "slurm"]
# "stopped": saved and left on request; "done": nothing is left to do.
Phase = Literal["loading", "training", "saving", "exporting", "stopped", "done"]
Outcome = Literal["done", "requeue", "failed", "cancelled"]
_TAIL_BYTES = 64 << 10
_TAIL_LINES = 25


@dataclass(frozen=True, kw_only=True)
class Record:
    """A JSON file with a fixed set of keys."""

    def write(self, path: Path) -> None:
        """Atomic: readers see the old file or the new one."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """Keys that this version does not know are left out; ValueError when one is missing."""
        known = {item.name for item in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in tree.items() if key in known})
        except TypeError as error:
            raise ValueError(f"not a {cls.__name__}: {error}") from error

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None when there is no such file; ValueError when it holds something else."""
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return cls.from_json(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it") from error


@dataclass(frozen=True, kw_only=True)
class Component(Record):
    """One job step of a life: the trainer (or another driver), a rollout server or a judge."""

    name: str  # "trainer", "evaluate", "rollout-0", "judge-0"
    nodes: tuple[str, ...]
    tasks: int  # processes over all nodes
    gpus_per_node: int  # 0: the step sees no GPU

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        return super().from_json({**tree, "nodes": tuple(tree.get("nodes", ()))})


@dataclass(frozen=True, kw_only=True)
class RunInfo(Record):
    """`live/run.json`: the life that is in progress, or was when its supervisor died."""

    stage: str  # "sft", "rm", "rl", "eval", "annotate", "judge", "serve"
    life: int
    launcher: Launcher
    host: str  # where the supervisor runs
    pid: int
    started: float
    ends: float | None  # the job's time limit; None: none is known
    job_id: str | None = None
    slurm_restarts: int = 0
    components: tuple[Component, ...] = ()

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        components = tuple(Component.from_json(item) for item in tree.get("components", ()))
        return super().from_json({**tree, "components": components})


@dataclass(frozen=True, kw_only=True)
class Address(Record):
    """`live/<component>.address.json`: written by a server once it has completed a request."""

    component: str
    url: str  # "http://host:port", without /v1
    served_name: str  # what requests call the model
    host: str
    ready_at: float
    start: int = 0  # which start of this server in this life; 0 is the first
    weight_transport: str | None = None  # how it takes weights, "auto" resolved on its machine; None: it takes none


@dataclass(frozen=True, kw_only=True)
class ServerEnd(Record):
    """`live/<server>.end.json`: a server that is not there any more. The file of a later start replaces it."""

    start: int
    code: int
    what: str  # in words


@dataclass(frozen=True, kw_only=True)
class ServerOrder(Record):
    """`live/<server>.order.json`: what the supervisor is to do with a server, from the process that sends it work."""

    start: int  # "start": the number of the new start; "stop": of the one to end
    what: Literal["start", "stop", "give_up"]  # give_up: the life cannot go on without it
    reason: str


@dataclass(frozen=True, kw_only=True)
class Heartbeat(Record):
    """`live/trainer.heartbeat.json`: written at every change of phase and after every step."""

    component: str
    host: str
    pid: int
    time: float
    phase: Phase
    step: int  # finished steps
    total_steps: int | None = None  # None: not known yet
    first_step: int | None = None  # where this life began: 0, or the step of the checkpoint that it resumed
    longest_step_s: float = 0.0  # of this life, without saving
    longest_save_s: float = 0.0
    saved_step: int | None = None  # of the newest checkpoint; None: none yet


@dataclass(frozen=True, kw_only=True)
class StopRequest(Record):
    """`live/stop.json`: the trainer finishes its step, saves, and leaves; the life ends with `EXIT_REQUEUE`."""

    reason: str
    time: float = field(default_factory=time.time)


@dataclass(frozen=True, kw_only=True)
class ExitReport(Record):
    """`exit.json`: why a life ended."""

    outcome: Outcome
    code: int  # exit code of the supervisor; `EXIT_DONE`, `EXIT_REQUEUE`, or a failure
    reason: str  # one line
    life: int
    time: float
    component: str | None = None  # the one that failed first
    log: str | None = None  # its log file, relative to the run directory
    log_tail: tuple[str, ...] = ()  # the last lines of that log
    job_id: str | None = None
    step: int | None = None  # finished steps
    saved_step: int | None = None

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        return super().from_json({**tree, "log_tail": tuple(tree.get("log_tail", ()))})


@dataclass(frozen=True, kw_only=True)
class RunDir:
    """Paths of a run directory, and the lives that it has seen."""

    LIVE: ClassVar[str] = "live"
    root: Path

    @property
    def live(self) -> Path:
        return self.root / self.LIVE

    @property
    def run_info(self) -> Path:
        return self.live / "run.json"

    @property
    def heartbeat(self) -> Path:
        return self.live / "trainer.heartbeat.json"

    @property
    def stop(self) -> Path:
        return self.live / "stop.json"

    @property
    def exit_report(self) -> Path:
        return self.root / "exit.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def done(self) -> Path:
        return self.root / "DONE"

    def step_id(self, component: str) -> Path:
        return self.live / f"{component}.step"

    def address(self, component: str) -> Path:
        return self.live / f"{component}.address.json"

    def logs(self, life: int) -> Path:
        return self.root / f"logs-{life}"

    def life_report(self, life: int) -> Path:
        return self.logs(life) / "exit.json"

    def log(self, life: int, component: str) -> Path:
        return self.logs(life) / f"{component}.log"

    def servers(self, kind: str) -> Path:
        return self.live / f"{kind}-servers.json"

    def server_end(self, component: str) -> Path:
        return self.live / f"{component}.end.json"

    def server_order(self, component: str) -> Path:
        return self.live / f"{component}.order.json"

    def lives(self) -> list[int]:
        """Numbers of the lives that left logs, in order."""
        matches = (re.fullmatch(r"logs-(\d+)", path.name) for path in self.root.glob("logs-*"))
        return sorted(int(match[1]) for match in matches if match)

    def addresses(self, kind: str) -> list[Address]:
        """Servers of one kind ("rollout", "judge") that are ready, by index."""
        found = [Address.read(path) for path in self.live.glob(f"{kind}-*.address.json")]
        return sorted((a for a in found if a is not None), key=lambda a: int(a.component.rpartition("-")[2]))


def exists_on_shared(path: Path) -> bool:
    """Whether a file is there, also when another host has just made it.

    NFS clients remember for up to a minute that a file was missing. Opening its folder makes them ask the server.
    """
    try:
        with os.scandir(path.parent) as entries:
            return any(entry.name == path.name for entry in entries)
    except FileNotFoundError:
        return False


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 2:
        return f"{60 * minutes + rest} s"
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min"
    days, hours = divmod(hours, 24)
    return f"{hours} h {minutes} min" if days == 0 else f"{days} d {hours} h"


def last_lines(path: Path) -> tuple[str, ...]:
    """The end of a log; of a progress bar, which overwrites its line, only the last state."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return ()
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return tuple([line for line in lines if line][-_TAIL_LINES:])
