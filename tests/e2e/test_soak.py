"""A short soak: real RL steps while servers are killed and stopped; afterwards everything is counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_nothing_is_lost_or_left_over(tmp_path: Path) -> None:
    """In a process of its own, whose descriptors and children are the run's only."""
    done = subprocess.run(
        [sys.executable, str(SOAK), "--steps", "18", "--fault-every", "4", "--seed", "10", "--check"],
        cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    assert "everything accounted for" in done.stdout.splitlines()[-1]
