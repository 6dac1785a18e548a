from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from running_service import Running


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def make(**options) -> Running:
        started.append(Running(**options))
        return started[-1]

    yield make
    for running in started:
        running.stop()
