from collections.abc import Callable, Iterator

import pytest
from scripted_server import Action, ScriptedServer


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    servers: list[ScriptedServer] = []

    def start(*actions: Action) -> ScriptedServer:
        servers.append(ScriptedServer(actions))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
