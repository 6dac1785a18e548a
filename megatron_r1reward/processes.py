"""Child processes that never outlive their parent, and programs of big libraries that start and end quickly."""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1
# transformers imports scikit-learn and pandas for a kind of assisted generation, and SciPy for boxes of detectors, and
# vLLM SciPy for audio; nothing here asks for these: a tenth of a program's start.
_UNUSED = ("sklearn", "scipy")


def die_with_parent(parent: int) -> None:
    """Called in a child of the process `parent`: the kernel kills it when its parent ends, however and whenever that
    ends (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)


@contextmanager
def quick_imports() -> Iterator[None]:
    """For the imports of a program's start, in its main thread: the cyclic garbage collector has a holiday, and what
    libraries would import for nothing (`_UNUSED`) is not there for them; whoever needs it imports it later.

    Importing torch, transformers and vLLM makes a million objects that stay, and the collector searches them again and
    again: a tenth of the time. What is there at the end it never looks at again (`gc.freeze`), so a later full
    collection is short, and a forked child shares these pages.
    """
    hidden = [name for name in _UNUSED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: there is no such module
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
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
