"""Child processes that never outlive their parent, and programs of big libraries that start and end quickly."""

from __future__ import annotations

import atexit
import ctypes
import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Called in a child: the kernel kills it when its parent ends, however that ends (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of a program's start, in its main thread: the cyclic garbage collector has a holiday.

    Importing torch, transformers and vLLM makes a million objects that stay, and the collector searches them again and
    again: a tenth of the time. What is there at the end it never looks at again (`gc.freeze`), so a later full
    collection is short, and a forked child shares these pages.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave_quickly() -> None:
    """At the interpreter's exit, when all that was registered for it later has run, do not search the whole heap for
    garbage: the memory goes back to the kernel anyway, and with a few thousand modules the search takes seconds.
    For programs that close what they have opened: destructors of objects that are in use to the end may not run."""
    atexit.register(gc.freeze)
