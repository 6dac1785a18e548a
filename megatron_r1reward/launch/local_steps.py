"""Job steps as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from megatron_r1reward.cluster.placement import Placement
from megatron_r1reward.cluster.visible_gpus import VARIABLE, names_of
from megatron_r1reward.launch.steps import StepEnd, code_of, name_of
from megatron_r1reward.network.tokens import TOKEN_VARIABLE
from megatron_r1reward.processes import die_with_parent
from megatron_r1reward.run_dir import RunDir
from megatron_r1reward.servers.keeper import descendants

_FAMILY_GRACE_S = 8.0


class LocalStep:
    """All tasks of one step. The first that fails ends the others."""

    def __init__(
        self, placement: Placement, processes: Sequence[subprocess.Popen[bytes]], tees: Sequence[threading.Thread]
    ) -> None:
        self.name = placement.component.name
        self._processes = processes
        self._tees = tees
        self._failed: StepEnd | None = None

    def poll(self) -> StepEnd | None:
        codes = [process.poll() for process in self._processes]
        if self._failed is None:
            for rank, code in enumerate(codes):
                if code:
                    what = f"task {rank} {name_of(code_of(code))}" if len(codes) > 1 else name_of(code_of(code))
                    self._failed = StepEnd(code=code_of(code), what=what)
                    self.signal(signal.SIGTERM)
                    for tee in self._tees[rank : rank + 1]:
                        tee.join(timeout=5)  # the reason is in its last lines: the report wants them in the log
                    break
        if self._failed is not None:
            return self._failed
        if any(code is None for code in codes):
            return None
        for tee in self._tees:
            tee.join(timeout=5)
        return StepEnd(code=0, what="exited with code 0")

    @property
    def running(self) -> bool:
        """Whether any task is left, also after a failure was reported."""
        return any(process.poll() is None for process in self._processes)

    def signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)
                if number == signal.SIGCONT:
                    _send(number, descendants(process.pid))

    def kill(self) -> None:
        family: set[int] = set()
        for process in self._processes:
            if process.poll() is None:
                family |= descendants(process.pid)
                process.kill()
            process.wait()
        # A server's keeper sees that and ends vLLM, workers and their memory; whatever cannot is killed as well.
        _send(signal.SIGCONT, family)
        deadline = time.monotonic() + _FAMILY_GRACE_S
        while (family := {pid for pid in family if _is_there(pid)}) and time.monotonic() < deadline:
            time.sleep(0.05)
        _send(signal.SIGKILL, family)
        for tee in self._tees:
            tee.join(timeout=5)


def _send(number: signal.Signals, pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_there(pid: int) -> bool:
    """Whether it still runs; one that nobody has waited for is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class LocalLauncher:
    """Starts tasks as children of this process; they die with it."""

    def __init__(self, run: RunDir, *, token: str, console: bool = True) -> None:
        self._run = run
        self._token = token
        self._console = console

    def start(self, placement: Placement, command: Sequence[str], log: Path) -> LocalStep:
        part = placement.component
        log.parent.mkdir(parents=True, exist_ok=True)
        processes, tees = [], []
        show = self._console and placement.kind == "driver"
        for rank in range(part.tasks):
            environment = dict(os.environ) | {TOKEN_VARIABLE: self._token}
            if placement.kind == "driver" and part.tasks > 1:
                environment |= {"RANK": str(rank), "WORLD_SIZE": str(part.tasks), "LOCAL_RANK": str(rank)}
            if placement.gpu_ids:
                environment[VARIABLE] = names_of(placement.gpu_ids, os.environ)
            with log.open("ab") as handle:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if show else handle,
                    stderr=subprocess.STDOUT,
                    preexec_fn=partial(die_with_parent, os.getpid()),
                )
            processes.append(process)
            if show:
                assert process.stdout is not None
                tee = threading.Thread(target=_tee, args=(process.stdout, log), name=f"tee-{rank}", daemon=True)
                tee.start()
                tees.append(tee)
        self._run.step_id(part.name).write_text("\n".join(f"pid {process.pid}" for process in processes) + "\n")
        return LocalStep(placement, processes, tees)

    def lost_nodes(self) -> tuple[str, ...]:
        return ()

    def ends(self) -> float | None:
        return None

    def why_ending(self) -> str:
        return "interrupted"

    def requeue(self) -> str | None:
        return "start the same command again to continue"


def _tee(source: BinaryIO, log: Path) -> None:
    """Copy a task's output to the log and to our own standard error."""
    with log.open("ab") as handle:
        while chunk := source.read1(1 << 16):  # type: ignore[attr-defined]  # a buffered pipe
            handle.write(chunk)
            handle.flush()
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
