"""`python tests/suite.py ARGUMENTS`: pytest, run as the programs of this package are (`megatron_r1reward.processes`).

Its end takes nothing apart, and its tests and the ranks forked from them keep all frames in one place."""

from __future__ import annotations

import sys

import pytest

from megatron_r1reward.processes import run_program

if __name__ == "__main__":
    run_program(lambda: sys.exit(pytest.main()))
