"""The start and the end of programs: no search for garbage where there is none to be had."""

from __future__ import annotations

import gc
import subprocess
import sys

from megatron_r1reward.processes import quick_imports

ENDING = """
import atexit
{leave}

class Loud:
    def __del__(self):
        print("searched the heap")

a, b = Loud(), Loud()
a.other, b.other = b, a  # only the garbage collector can find them
atexit.register(print, "exit handlers ran")
"""


def words_of(leave: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(leave=leave)], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_exit_of_a_program_runs_its_handlers_but_does_not_search_the_heap() -> None:
    quick = words_of("from megatron_r1reward.processes import leave_quickly; leave_quickly()")
    assert quick == ["exit handlers ran"]
    assert words_of("") == [*quick, "searched the heap", "searched the heap"]


def test_imports_collect_nothing_and_what_they_leave_is_never_searched() -> None:
    collections = sum(generation["collections"] for generation in gc.get_stats())
    frozen = gc.get_freeze_count()
    try:
        with quick_imports():
            kept = [[number] for number in range(100_000)]
            assert sum(generation["collections"] for generation in gc.get_stats()) == collections
        assert gc.isenabled()
        assert gc.get_freeze_count() >= frozen + len(kept)
    finally:
        gc.unfreeze()
