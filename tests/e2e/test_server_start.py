"""The death of the process that started it interrupts vLLM's start (other programs: unit/servers/test_keeper.py)."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from orphans import MARK, Starter
from reference import SERVER

from megatron_r1reward.servers.process import VllmServer

pytestmark = pytest.mark.e2e
STARTS = 4


def test_a_starter_killed_at_any_moment_of_a_real_start_leaves_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    """Four servers start side by side, one with two workers, which have shared memory; each is hit somewhere else."""

    def start(number: int) -> None:
        section = SERVER.model_copy(update={"tensor_parallel_size": 2 if number == 0 else 1})
        server = VllmServer(section, model_path=tiny_folder, log_path=tmp_path / f"{number}.log")
        server._environment[MARK] = os.environ[MARK]
        server.start()

    draw = random.Random(5)
    starters = [Starter(lambda number=number: start(number)) for number in range(STARTS)]
    began = time.monotonic()
    # One moment in each quarter of what four starts side by side take on two cores; the one with workers comes last.
    for number in reversed(range(STARTS)):
        moment = (STARTS - 1 - number + draw.random()) * 8.0
        while time.monotonic() < began + moment:
            time.sleep(0.2)
        starters[number].kill()
    for one in starters:
        one.assert_nothing_is_left()
