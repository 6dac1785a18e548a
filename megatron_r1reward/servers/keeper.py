"""A server's keeper: the process that its starter sees. It forks, the child becomes vLLM, and the keeper ends with it.

    starter --- starts, SIGTERM ---> keeper --- forks, SIGTERM, SIGKILL ---> vLLM --- forks ---> engine, workers

vLLM loads for seconds, may swallow a SIGTERM while it does, and leaves workers and shared memory when it is killed. The
keeper loads nothing, holds no lock of anybody and sees all of them (it is their subreaper). So whatever ends first, and
however: starter gone, vLLM dead, told to end, or the keeper itself killed (then the kernel kills vLLM), at the end no
process, no shared memory and no temporary file is left. Nothing is asked twice that did not answer in time.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from megatron_r1reward.processes import die_with_parent

SCRATCH_PREFIX = "r1reward-server-"
KEEPER_GRACE_S = 10.0  # from SIGTERM to SIGKILL; a starter that waits longer than this need not kill anything itself
_ORPHAN_GRACE_S = 3.0  # nobody waits for what an orphan still has to say
_DYING_S = 10.0  # from SIGKILL to the end of who gets it, on a busy machine
_TICK_S = 0.2
_LOOK_INTERVAL_S = 2.0  # how often shared memory is noted, for the case that its owner is killed
_SHARED_MEMORY = Path("/dev/shm")
_PR_SET_CHILD_SUBREAPER = 36
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def keep() -> None:
    """Returns in a child, which goes on as the program; the caller becomes its keeper and leaves with its exit code
    (128 + n when signal n ended it). The program is to end when the caller's parent does, or standard input."""
    starter = os.getppid()
    signals = (signal.SIGCHLD, *_ENDING)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    keeper, program = os.getpid(), os.fork()
    if program:
        os._exit(_Keeper(program, starter).run(signals))
    die_with_parent(keeper)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Keeper:
    def __init__(self, program: int, starter: int) -> None:
        self._program = program
        self._starter = starter
        self._code: int | None = None  # of the program
        self._deadline: float | None = None  # when everything is killed
        self._traces: set[Path] = set()

    def run(self, signals: Iterable[signal.Signals]) -> int:
        next_look = 0.0
        while self._code is None:
            told = signal.sigtimedwait(signals, _TICK_S)
            self._reap()
            # By name: interrupted, e.g. by a suspension, Python 3.11 may return numbers that are no signal's.
            if told is not None and told.si_signo in _ENDING:
                self._end(KEEPER_GRACE_S)
            if self._is_orphan():
                self._end(_ORPHAN_GRACE_S)
            if (now := time.monotonic()) >= next_look:
                self._look()
                next_look = now + _LOOK_INTERVAL_S
            if self._deadline is not None and now >= self._deadline:
                break
        self._kill_all()
        remove_unmapped(self._traces)
        folder = os.environ.get("TMPDIR", "")
        if os.path.basename(folder).startswith(SCRATCH_PREFIX):
            shutil.rmtree(folder, ignore_errors=True)
        return 128 + signal.SIGKILL if self._code is None else self._code

    def _is_orphan(self) -> bool:
        """The pipe tells of a starter that was gone before its number could be read, the number of one whose children
        hold the pipe, too."""
        if os.getppid() != self._starter:
            return True
        readable, _, _ = select.select([0], [], [], 0)
        return bool(readable) and not os.read(0, 4096)

    def _end(self, grace_s: float) -> None:
        """Ask once; a shorter grace than was given before holds."""
        if self._deadline is None:
            _send(signal.SIGSTOP, {self._program})  # it makes no shared memory between the look and its end
            self._look()
            _send(signal.SIGTERM, {self._program})
            _send(signal.SIGCONT, {self._program})
        self._deadline = min(time.monotonic() + grace_s, self._deadline or float("inf"))

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self._program:
                    code = os.waitstatus_to_exitcode(ended[1])
                    self._code = code if code >= 0 else 128 - code

    def _look(self) -> None:
        for pid in descendants(os.getpid()):
            with suppress(OSError):
                self._traces |= shared_memory_mapped(pid)

    def _kill_all(self) -> None:
        """Until none is left: what is being killed may have been forking."""
        while pids := descendants(os.getpid()):
            _send(signal.SIGSTOP, pids)
            self._look()
            _send(signal.SIGKILL, pids)
            time.sleep(0.01)
            self._reap()


def _send(number: signal.Signals, pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def descendants(pid: int) -> set[int]:
    """Children of a process, and theirs."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            with suppress(OSError):
                # "pid (name) state ppid ...", and the name may hold anything
                parent = int(Path(entry.path, "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        new = set(children.get(waiting.pop(), ())) - found
        found |= new
        waiting += new
    return found


def shared_memory_of(group: int) -> frozenset[Path]:
    """Files in /dev/shm that processes of process group `group` have mapped (vLLM's tensor-parallel message queues)."""
    found: set[Path] = set()
    for pid in _all_processes():
        with suppress(OSError):
            if os.getpgid(pid) == group:
                found |= shared_memory_mapped(pid)
    return frozenset(path for path in found if path.exists())


def shared_memory_mapped(pid: int) -> set[Path]:
    """Files in /dev/shm that process `pid` has mapped; an OSError when it is gone, or another user's."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    names = (line.split(maxsplit=5)[-1] for line in lines if str(_SHARED_MEMORY) in line)
    return {Path(name) for name in names if name.startswith(f"{_SHARED_MEMORY}/")}


def remove_unmapped(paths: Iterable[Path]) -> None:
    """Unlink those that are still there and that no process uses any more."""
    left = {path for path in paths if path.exists()}
    for pid in _all_processes() if left else ():
        with suppress(OSError):
            left -= shared_memory_mapped(pid)
    for path in left:
        path.unlink(missing_ok=True)


def remove_of_killed(group: int, paths: Iterable[Path]) -> None:
    """`remove_unmapped`, once no process of the killed process group `group` has shared memory mapped: a signal that
    was sent has not yet ended who gets it."""
    deadline = time.monotonic() + _DYING_S
    while shared_memory_of(group) and time.monotonic() < deadline:
        time.sleep(0.02)
    remove_unmapped(paths)


def _all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


class ScratchFolder:
    """A server's TMPDIR: sockets and files of one life, gone with it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
