"""What a dead server's log says about its death."""

from __future__ import annotations

import re
from pathlib import Path

_ERROR = re.compile(r"\b\w+(?:Error|Exception|Interrupt): .*")
_ENGINE = "(EngineCore"
_NOISE = re.compile(r"nanobind|- leaked|skipped remainder")  # printed by triton's bindings at every exit
_TAIL_LINES = 25
_ADDRESS_IN_USE = re.compile(rb"\[Errno 98\]|Address already in use|address already in use")


def explain(log_path: Path, start: int = 0) -> str:
    """The likely cause of death and the last lines of a vLLM log.

    An error appears once per layer that it passes through. If the engine process reported any, its last one is the
    cause (earlier ones may have been survived); otherwise the API process failed, and its first one is.

    Args:
        start: byte at which the server's life begins in the log.
    """
    with log_path.open("rb") as log:
        log.seek(start)
        lines = [line for line in log.read().decode(errors="replace").splitlines() if not _NOISE.search(line)]
    errors = [(line, match[0]) for line in lines if "WARNING" not in line and (match := _ERROR.search(line))]
    of_engine = [error for line, error in errors if line.startswith(_ENGINE)][-1:]
    of_anyone = [error for _, error in errors[:1]]
    cause = (of_engine or of_anyone or ["the log shows no error"])[0]
    tail = "\n".join(f"  | {line}" for line in lines[-_TAIL_LINES:])
    return f"{cause}\nthe end of its log {log_path}:\n{tail}"


def address_in_use(log_path: Path, start: int = 0) -> bool:
    """Whether a server found its port taken; `start` as in `explain`."""
    with log_path.open("rb") as log:
        log.seek(start)
        return _ADDRESS_IN_USE.search(log.read()) is not None
