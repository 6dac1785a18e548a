"""What a killed server would leave on the machine: shared memory and temporary files."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from megatron_r1reward.servers.vllm_main import SCRATCH_PREFIX

_SHARED_MEMORY = Path("/dev/shm")


def shared_memory_of(group: int) -> frozenset[Path]:
    """Files in /dev/shm that processes of process group `group` have mapped (vLLM's tensor-parallel message queues)."""
    found: set[Path] = set()
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error, PermissionError, FileNotFoundError):
            if os.getpgid(process.pid) == group:
                found |= shared_memory_mapped(process.pid)
    return frozenset(path for path in found if path.exists())


def shared_memory_mapped(pid: int) -> set[Path]:
    """Files in /dev/shm that process `pid` has mapped; an OSError when it is gone, or another user's."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    names = (line.split(maxsplit=5)[-1] for line in lines if str(_SHARED_MEMORY) in line)
    return {Path(name) for name in names if name.startswith(f"{_SHARED_MEMORY}/")}


def remove(paths: frozenset[Path]) -> None:
    """Unlink what is still there."""
    for path in paths:
        path.unlink(missing_ok=True)


class ScratchFolder:
    """A server's TMPDIR: sockets and files of one life, gone with it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
