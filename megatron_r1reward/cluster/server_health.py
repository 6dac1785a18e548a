"""Is a server there, and what did a component say last."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

_TIMEOUT_S = 5.0
_ATTEMPTS = 6
_PAUSE_S = 2.0
_TAIL_BYTES = 64 << 10
_TAIL_LINES = 25


def unhealthy(url: str, *, attempts: int = _ATTEMPTS) -> str | None:
    """None when the server at `url` answers /health; else what happened instead, at the last of several attempts."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # cluster nodes are not behind the proxy
    problem = "not asked"
    for attempt in range(attempts):
        if attempt:
            time.sleep(_PAUSE_S)
        try:
            with opener.open(f"{url}/health", timeout=_TIMEOUT_S):
                return None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            problem = str(error) or type(error).__name__
    return problem


def last_lines(path: Path) -> tuple[str, ...]:
    """The end of a log; of a progress bar, which overwrites its line, only the last state."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
    except FileNotFoundError:
        return ()
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return tuple([line for line in lines if line][-_TAIL_LINES:])
