"""The soak benchmark in short: real steps, real servers, random faults, and nothing lost or left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_a_short_soak() -> None:
    command = [sys.executable, str(PROGRAM), "--steps", "40", "--fault-every", "8", "--seed", "1", "--check"]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=800, check=False
    )
    print(done.stdout, done.stderr[-4000:])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "everything accounted for" in done.stdout.splitlines()[-1]
