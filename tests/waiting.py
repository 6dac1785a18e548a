"""Waiting for what happens in other threads and processes: for events, so that no test depends on anybody's speed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

_HANG_S: Final = 120.0
_ONE_TOO_MANY_S: Final = 0.1


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Fails after `seconds`: a bound on a hang, not on speed."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.01)


class Door:
    """Where the requests of a fake server are while it works on them: counts them, and keeps them while it is closed.

    Attributes:
        inside: requests at this moment. most: so many were inside at once.
    """

    def __init__(self) -> None:
        self.inside = self.most = 0
        self._opens_at: int | None = None
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()

    def close(self, until: int | None = None) -> None:
        """Nobody leaves until `open()`, or until `until` requests are inside, and one too many had time to come."""
        self._opens_at = until
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def __enter__(self) -> None:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
            complete = self.inside == self._opens_at and not self._open.is_set()
        if complete:
            time.sleep(_ONE_TOO_MANY_S)
            self._open.set()
        self._open.wait(_HANG_S)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.inside -= 1
