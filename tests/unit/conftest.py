from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_vllm import FakeVllm, Fault


@pytest.fixture
def fake_vllm() -> Iterator[Callable[..., FakeVllm]]:
    """Makes fake servers that are stopped after the test."""
    fakes: list[FakeVllm] = []

    def make(fault: Fault = "ok") -> FakeVllm:
        fakes.append(FakeVllm(fault))
        return fakes[-1]

    yield make
    for fake in fakes:
        fake.stop()
