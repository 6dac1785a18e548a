"""The local launcher: all ranks end together, and the exit code is the failure's."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from megatron_r1reward.launch import local


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replace the command that ranks run by a small script."""

    def use(script: str) -> None:
        path = tmp_path / "rank.py"
        path.write_text("import os, sys, time, signal\nrank = int(os.environ['RANK'])\n" + script)
        popen = local.subprocess.Popen
        monkeypatch.setattr(
            local.subprocess, "Popen", lambda command, **options: popen([sys.executable, str(path)], **options)
        )

    return use


def test_success_needs_all_ranks(program, tmp_path):
    program(f"open(r'{tmp_path}/' + os.environ['RANK'] + 'of' + os.environ['WORLD_SIZE'], 'w')")
    assert local.run_local_ranks(["rl"], 3) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"0of3", "1of3", "2of3"}


def test_one_failure_ends_the_others(program):
    program("time.sleep(60) if rank == 0 else sys.exit(7)")
    started = time.monotonic()
    assert local.run_local_ranks(["rl"], 2) == 7
    assert time.monotonic() - started < 20


def test_death_by_signal_is_a_failure(program):
    program("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    assert local.run_local_ranks(["rl"], 2) == 128 + 9
