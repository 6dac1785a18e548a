from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from scripted_server import ScriptedServer


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    """Starts servers that answer with the given actions; they are stopped after the test."""
    started: list[ScriptedServer] = []

    def start(*actions) -> ScriptedServer:
        started.append(ScriptedServer(actions))
        return started[-1]

    yield start
    for server in started:
        server.stop()
