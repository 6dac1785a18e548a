"""What a run of tests left behind: processes that carry its mark, shared memory that nobody uses, ports."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

MARK = "R1REWARD_TEST_RUN"  # in the environment of everything that a run of tests starts
SHARED_MEMORY = Path("/dev/shm")
# joblib, which transformers imports, makes semaphores of 32 bytes and removes them at a process's end; what a test
# kills with SIGKILL has none. Nobody's data lies in them.
_KILLED_LIBRARY = "sem.loky-"


def marked_processes(mark: str) -> list[psutil.Process]:
    """Processes that were started, at whatever distance, with `mark` in their environment; not this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it ended meanwhile, or is another user's
            continue
    return [process for process in found if process.pid != os.getpid()]


def shared_memory() -> set[str]:
    """Names of what lies in shared memory now."""
    names = {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()
    return {name for name in names if not name.startswith(_KILLED_LIBRARY)}


def _used_shared_memory() -> set[str]:
    """Names that some process has open or mapped."""
    prefix = f"{SHARED_MEMORY}/"
    used = set()
    for folder in Path("/proc").glob("[0-9]*"):
        for text in _mapped_and_open(folder):
            if prefix in text:
                used.add(text.partition(prefix)[2].split("/")[0].split(" (deleted)")[0].strip())
    return used


def _mapped_and_open(process: Path) -> Iterator[str]:
    try:
        yield from (process / "maps").read_text(errors="replace").splitlines()
        for link in (process / "fd").iterdir():
            yield os.readlink(link)
    except OSError:  # it ended meanwhile
        return


def left_behind(mark: str, shared_before: set[str], *, patience_s: float = 30.0) -> list[str]:
    """One line for each thing that is still there after `patience_s`; none when all is gone.

    Args:
        shared_before: `shared_memory()` before the run. What came later and is in use belongs to somebody else's run.
    """
    deadline = time.monotonic() + patience_s
    while (lines := _lines(mark, shared_before)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return lines


def _lines(mark: str, shared_before: set[str]) -> list[str]:
    lines = []
    for process in marked_processes(mark):
        try:
            command = " ".join(process.cmdline())[:100]
            ports = sorted({c.laddr.port for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN})
        except psutil.Error:
            continue
        listens = f", listens on {', '.join(map(str, ports))}" if ports else ""
        lines.append(f"process {process.pid}{listens}: {command}")
    if leaked := shared_memory() - shared_before:
        lines += [f"shared memory {SHARED_MEMORY / name}" for name in sorted(leaked - _used_shared_memory())]
    return lines
