"""Starters of servers that are killed in the middle of it, and what is left of the servers then."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from waiting import wait_until

from megatron_r1reward.servers.keeper import shared_memory_mapped

MARK = "R1REWARD_TEST_MARK"


class Starter:
    """A child of this process that calls `start` and then does nothing; forked, so it also holds copies of the pipes
    of all servers that others have started."""

    def __init__(self, start: Callable[[], object]) -> None:
        self.mark = uuid.uuid4().hex
        self.traces: set[Path] = set()  # shared memory and temporary folders of its server
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.environ[MARK] = self.mark
                start()
                time.sleep(3600)
            finally:
                os._exit(1)

    def kill(self) -> None:
        self.look()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def servers(self) -> list[int]:
        """Processes of its server."""
        found = []
        for name in os.listdir("/proc"):
            with suppress(OSError):
                if name.isdecimal() and f"{MARK}={self.mark}".encode() in Path(f"/proc/{name}/environ").read_bytes():
                    found.append(int(name))
        return found

    def look(self) -> None:
        for pid in self.servers():
            with suppress(OSError):
                self.traces |= shared_memory_mapped(pid)
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                self.traces |= {Path(os.fsdecode(v[7:])) for v in variables if v.startswith(b"TMPDIR=")}

    def assert_nothing_is_left(self, seconds: float = 120.0) -> None:
        wait_until(lambda: not self.servers(), seconds)
        assert not [path for path in self.traces if path.exists()]
        assert not list(Path("/dev/shm").glob(f"*{self.mark}*"))
