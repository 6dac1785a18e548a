"""The GPU suite goes through its stages on a machine without a GPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import forked_ranks
import pytest
import torch

pytestmark = pytest.mark.parallel
ROOT = Path(__file__).parents[2]


def suite(results: Path, *stages: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "STAGES": " ".join(stages), "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "benchmarks" / "gpu_suite.sh"), "--dry-run", str(results)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1500)


def test_a_dry_run_trains_on_the_second_device_and_ends_with_a_table(tmp_path: Path) -> None:
    """SFT and RL from a record; the long stages differ in size and ranks only."""
    result = suite(tmp_path, "table", "train-tiny", "ipc")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    stages = [json.loads(line) for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert [(stage["name"], stage["status"]) for stage in stages] == [("table", 0), ("train-tiny", 0), ("ipc", 0)]
    rows = json.loads((tmp_path / "train-tiny.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == ["sft", "rl from a record"]
    assert "rl from a record" in result.stdout.splitlines()[-3]


def test_a_stage_that_fails_does_not_end_the_suite_and_is_told(tmp_path: Path) -> None:
    program = tmp_path / "broken-python"
    program.write_text(f'#!/bin/sh\ncase "$*" in *gpu_ipc_push*) exit 3;; esac\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(program), "STAGES": "ipc sanitize"}
    command = [str(ROOT / "benchmarks" / "gpu_suite.sh"), "--dry-run", str(tmp_path / "out")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1500)
    assert result.returncode == 1
    stages = [json.loads(line) for line in (tmp_path / "out" / "stages.jsonl").read_text().splitlines()]
    assert [(stage["name"], stage["status"]) for stage in stages] == [("ipc", 3), ("sanitize", 0)]


def test_ranks_are_spawned_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA does not survive a fork, and asking for a GPU has initialised it in this process already."""
    asked: list[str] = []

    class AskedError(Exception):
        pass

    def context(method: str) -> None:
        asked.append(method)
        raise AskedError

    monkeypatch.setattr(multiprocessing, "get_context", context)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with pytest.raises(AskedError):
            forked_ranks.run_ranks(print, 1)
    assert asked == ["spawn", "fork"]
