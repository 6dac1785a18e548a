"""Several trainer ranks on this machine: start them, watch them, end them together."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

_PR_SET_PDEATHSIG = 1
_POLL_INTERVAL_S = 0.2
_GRACE_S = 20.0


def under_a_launcher() -> bool:
    """Whether torchrun, Slurm or `run_local_ranks` started this process as one of several ranks."""
    return "RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(arguments: Sequence[str], ranks: int) -> list[subprocess.Popen[bytes]]:
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_r1reward.cli", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            preexec_fn=_die_with_parent,
        )
        for rank in range(ranks)
    ]


def run_local_ranks(arguments: Sequence[str], ranks: int) -> int:
    """Run `r1reward <arguments>` as `ranks` processes of one world; returns the exit code of the first that failed.

    When one fails the others are ended. SIGTERM is passed on; if this process dies, so do the ranks.
    """
    processes = _start(arguments, ranks)

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    previous = signal.signal(signal.SIGTERM, forward)
    try:
        return _watch(processes)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end(processes)


def _watch(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in processes]
        failed = next((code for code in codes if code), None)
        if failed is not None:
            return failed if failed > 0 else 128 - failed  # killed by a signal: the shell's convention
        if all(code == 0 for code in codes):
            return 0
        time.sleep(_POLL_INTERVAL_S)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
