from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from fake_vllm import FakeVllm, Fault

from megatron_r1reward.rollout import pool


@pytest.fixture
def fake_vllm() -> Iterator[Callable[..., FakeVllm]]:
    """Makes fake servers that are stopped after the test."""
    fakes: list[FakeVllm] = []

    def make(fault: Fault = "ok", **options: float) -> FakeVllm:
        fakes.append(FakeVllm(fault, **options))
        return fakes[-1]

    yield make
    for fake in fakes:
        fake.stop()


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_BACKOFF_BASE_S", 0.01)
