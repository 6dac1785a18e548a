"""Child processes that never outlive their parent, and programs of big libraries that start and end quickly."""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
# transformers imports scikit-learn and pandas for a kind of assisted generation, and SciPy for boxes of detectors, and
# vLLM SciPy for audio; nothing here asks for these: a tenth of a program's start.
_UNUSED = ("sklearn", "scipy")
_FRAME_SLOTS = 2**17  # of 8 bytes: a chunk of 2 MiB, of which this frame takes half; nothing touches that half


def die_with_parent(parent: int) -> None:
    """Called in a child of the process `parent`: the kernel kills it when its parent ends, however and whenever that
    ends (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)


def on_one_stack(function: Callable[[], T]) -> T:
    """Call `function` where all Python frames below it lie in one piece of memory.

    CPython (3.11 and later) keeps a thread's frames in chunks of 16 KiB, maps a new one when a call does not fit and
    gives it back when that call returns. A loop whose calls meet the end of a chunk maps, touches and unmaps one each
    time: 40,000 times while vLLM is imported, thousands of times per second while a small model trains. A chunk is as
    large as its first frame needs, so a large first frame leaves room for all others. Forked children have it, too.
    """

    def call() -> T:
        return function()

    call.__code__ = call.__code__.replace(co_stacksize=_FRAME_SLOTS)
    return call()


@contextmanager
def quick_imports() -> Iterator[None]:
    """For imports of big libraries, in the main thread: the cyclic garbage collector has a holiday, and what libraries
    would import for nothing (`_UNUSED`) is not there for them; whoever needs it imports it later.

    Importing torch, transformers and vLLM makes a million objects that stay, and the collector searches them again and
    again: a tenth of the time. What is there at the end it never looks at again (`gc.freeze`), so a later full
    collection is short, and a forked child shares these pages.
    """
    hidden = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: there is no such module
    before, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:  # else garbage alone would stay
            gc.freeze()
        if enabled:
            gc.enable()
        for name in hidden:
            sys.modules.pop(name, None)


@contextmanager
def quick_exit() -> Iterator[None]:
    """Around a program's main function: its end does not take the interpreter apart, which with the thousands of
    modules of torch, transformers and vLLM costs seconds per process; the kernel takes the memory back anyway.

    Threads are waited for, exit handlers that were registered inside run, and the exit code is the same. Destructors of
    what is still in use do not run: whoever opens something closes it. An error's traceback is the last thing that is
    seen: libraries that count their objects at the end of the interpreter have no say. Only Ctrl-C ends as usual.
    """
    codes: list[int] = []
    pid = os.getpid()

    def leave() -> None:
        if codes and os.getpid() == pid:  # a forked child has an end of its own
            logging.shutdown()  # which registered itself earlier
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(codes[0])

    atexit.register(leave)  # the first to be registered inside is the last to run
    try:
        yield
    except SystemExit as end:
        codes.append(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except Exception:
        codes.append(1)
        raise
    codes.append(0)


def run_program(main: Callable[[], object]) -> None:
    """A program's main function as those of this package run: all frames in one place, and a quick end."""
    with quick_exit():
        on_one_stack(main)
