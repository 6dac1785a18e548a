"""The start and the end of programs: no search for garbage where there is none to be had."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from megatron_r1reward.processes import quick_imports

ENDING = """
import atexit, sys, threading, time
from megatron_r1reward.processes import quick_exit

class Loud:
    def __del__(self):
        print("was taken apart")

a = Loud()
a.me = a  # only the garbage collector can find it

def late():
    time.sleep(0.2)
    print("a thread was waited for")

def main():
    atexit.register(print, "exit handlers ran")
    threading.Thread(target=late).start()
    {end}

{call}
"""
COMMON = ["a thread was waited for", "exit handlers ran"]


def ends(end: str, call: str = "with quick_exit(): main()") -> tuple[int, list[str]]:
    """Exit code and lines of a program; its standard output is a pipe, which is flushed late."""
    program = ENDING.format(end=end, call=call)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


@pytest.mark.slow
def test_a_program_ends_with_its_exit_code_its_handlers_and_threads_and_is_not_taken_apart() -> None:
    assert ends("pass", "main()") == (0, [*COMMON, "was taken apart"])
    assert ends("pass") == (0, COMMON)
    assert ends("sys.exit(75)") == (75, COMMON)
    assert ends("sys.exit()") == (0, COMMON)


def test_an_error_is_the_last_thing_that_is_said() -> None:
    """Nothing is taken apart, so no library complains about its objects after the message."""
    assert ends("sys.exit('words')") == (1, COMMON)
    assert ends("raise RuntimeError") == (1, COMMON)
    assert ends("raise KeyboardInterrupt")[1] == [*COMMON, "was taken apart"]


def test_imports_collect_nothing_and_what_they_leave_is_never_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    collections = sum(generation["collections"] for generation in gc.get_stats())
    before = gc.get_freeze_count()
    try:
        with quick_imports():
            monkeypatch.setitem(sys.modules, "imported_just_now", sys)
            kept = [[number] for number in range(100_000)]
            assert sum(generation["collections"] for generation in gc.get_stats()) == collections
        assert gc.isenabled()
        assert (frozen := gc.get_freeze_count()) >= before + len(kept)
        with quick_imports():
            more = [[number] for number in range(100_000)]
        assert gc.get_freeze_count() < frozen + len(more), "nothing was imported: what is there may be garbage"
    finally:
        gc.unfreeze()


def test_what_is_imported_for_nothing_is_not_there_for_the_time_of_the_imports() -> None:
    """transformers looks for SciPy once, and goes without; whoever needs it finds it afterwards."""
    program = (
        "import sys; from importlib.util import find_spec\n"
        "from megatron_r1reward.processes import quick_imports\n"
        "with quick_imports(): assert find_spec('sklearn') is find_spec('scipy') is None\n"
        "assert None not in (find_spec('sklearn'), find_spec('scipy'))\n"
        "import wave as sklearn; sys.modules['sklearn'] = sklearn\n"
        "with quick_imports(): import sklearn as found; assert found is sklearn, 'what is there already stays'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FRAMES = """
import resource
from megatron_r1reward.processes import on_one_stack

def leaf():
    a = b = c = d = e = f = g = h = i = j = k = l = m = n = o = p = q = r = s = t = u = v = w = x = y = z = None

def faults(depth):
    if depth:
        return faults(depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(1000):
        leaf()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def most():
    return max(faults(depth) for depth in range(300))

print({call})
"""


@pytest.mark.parametrize(("call", "maps_memory_in_a_loop"), [("most()", True), ("on_one_stack(most)", False)])
def test_calls_at_no_depth_map_memory_again_and_again(call: str, maps_memory_in_a_loop: bool) -> None:
    program = FRAMES.format(call=call)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (int(done.stdout) >= 1000) == maps_memory_in_a_loop
