"""A job step as the supervisor sees it, whoever runs it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_r1reward.cluster.placement import Placement


@dataclass(frozen=True, kw_only=True)
class StepEnd:
    """How a step ended."""

    code: int  # exit code of the task that failed first; 128 + n when signal n killed it; 0 when all left with 0
    what: str  # e.g. "task 3 on n2 exited with code 13"


class RunningStep(Protocol):
    @property
    def name(self) -> str: ...

    def poll(self) -> StepEnd | None:
        """None while it runs well; the first failure is reported while its other tasks are still being ended."""

    @property
    def running(self) -> bool:
        """Whether any of its processes is left."""

    def signal(self, number: signal.Signals) -> None:
        """To every task; nothing happens when the step has not begun or has ended."""

    def kill(self) -> None:
        """End it at once, whatever it does."""


class StepLauncher(Protocol):
    """Starts steps; knows what only the resource manager knows."""

    def start(self, placement: Placement, command: Sequence[str], log: Path) -> RunningStep: ...

    def lost_nodes(self) -> tuple[str, ...]:
        """Nodes of this job that do not answer any more."""

    def ends(self) -> float | None:
        """When the time limit ends this job (seconds since the epoch); None without a limit."""

    def why_ending(self) -> str:
        """What the resource manager says about a job that it has just sent SIGTERM."""

    def requeue(self) -> str | None:
        """Ask for another turn of this job; None, or why there will be none."""


def code_of(returncode: int) -> int:
    """The shell's convention for a process that a signal ended."""
    return returncode if returncode >= 0 else 128 - returncode


def name_of(code: int) -> str:
    """Words for an exit code."""
    if code > 128:
        try:
            return f"was killed by {signal.Signals(code - 128).name}"
        except ValueError:
            pass
    return f"exited with code {code}"


def describe(placements: Sequence[Placement]) -> str:
    """One line per component."""
    lines = []
    for item in placements:
        part = item.component
        gpus = f", {part.gpus_per_node} GPUs per node" if part.gpus_per_node else ""
        lines.append(
            f"{part.name}: {part.tasks} task(s) on {','.join(part.nodes)}{gpus}, {item.cpus_per_task} core(s) per task"
        )
    return "\n".join(lines)
