"""Fake servers for fault injection."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from scripted_server import Action, ScriptedServer

if TYPE_CHECKING:  # it brings torch along, which most tests can do without
    from fake_vllm import FakeVllm, Fault


@pytest.fixture
def fake_vllm() -> Iterator[Callable[..., FakeVllm]]:
    """Makes fake servers that are stopped after the test."""
    from fake_vllm import FakeVllm

    fakes: list[FakeVllm] = []

    def make(fault: Fault = "ok") -> FakeVllm:
        fakes.append(FakeVllm(fault))
        return fakes[-1]

    yield make
    for fake in fakes:
        fake.stop()


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """Start scripted judges; they are stopped after the test."""
    servers: list[ScriptedServer] = []

    def start(*actions: Action) -> ScriptedServer:
        servers.append(ScriptedServer(actions))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
