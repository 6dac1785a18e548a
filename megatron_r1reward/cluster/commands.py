"""Run a command of the site (Slurm's, nvidia-smi) without trusting that it exists, works or ever ends. All such calls
whose output is read go through here."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Output:
    """`code` is None when the command did not run to its end; `problem` says why it failed, in one line."""

    code: int | None
    stdout: str
    problem: str | None

    @property
    def missing(self) -> bool:
        return self.problem == "not found"


def run(command: Sequence[str], *, timeout_s: float = 20.0, environment: Mapping[str, str] | None = None) -> Output:
    """Run `command` with its input closed."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        return Output(code=None, stdout="", problem="not found")
    except PermissionError as error:
        return Output(code=None, stdout="", problem=f"cannot be executed ({error.strerror})")
    except subprocess.TimeoutExpired:
        return Output(code=None, stdout="", problem=f"did not answer within {timeout_s:g} s")
    if done.returncode == 0:
        return Output(code=0, stdout=done.stdout, problem=None)
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else "no message"
    return Output(code=done.returncode, stdout=done.stdout, problem=f"exit code {done.returncode}: {last}")
