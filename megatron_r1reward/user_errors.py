"""What every command does with its errors: a user's mistake is one line with thing, value and fix, and exit code 2."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

EXIT_USER_ERROR = 2
_PACKAGE = Path(__file__).parent
_FIXES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "choose a path that you may use, or change its permissions",
    errno.EPERM: "choose a path that you may use, or change its permissions",
    errno.ENOTDIR: "a part of the path is a file: name a folder",
    errno.EEXIST: "it is there already and is not what is needed: name another path",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space within your quota, or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EADDRINUSE: "another process has the port: end it, or choose another port",
    errno.ECONNREFUSED: "nobody listens there: check host and port, and whether the server runs",
}


@contextmanager
def user_errors(*, level: int = logging.INFO, component: bool = False) -> Iterator[None]:
    """Around the body of a command: sets up logging, and turns what the user can mend into one line on standard error.

    ValueError is a user's mistake by the rule of this code; so are the system's refusals (OSError) and what this
    package itself gives up with (RuntimeError raised in it: no server answers, a checkpoint is damaged). Errors of
    libraries and failed assertions keep their traceback and exit code 1.

    Args:
        level: of the log.
        component: a rank or a server, whose log is read by whoever looks for a fault: only ValueError is a line there.
    """
    _quieten(level)
    try:
        yield
    except (typer.Exit, typer.Abort):  # an exit code on its way, which is a RuntimeError too
        raise
    except (ValueError, OSError, RuntimeError) as error:
        if not isinstance(error, ValueError) and (component or not _is_ours(error)):
            raise
        tell(error)
        sys.exit(EXIT_USER_ERROR)


def tell(error: BaseException) -> None:
    """The line, red on a terminal. Nothing in it is read as markup."""
    line = f"error: {one_line(error)}"
    print(f"\033[31m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """What is wrong and, for the system's refusals, with which file and what to do."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) or type(error).__name__
    thing = "" if error.filename is None else f"{os.fsdecode(error.filename)!s}: "
    if error.filename2 is not None:
        thing = f"{thing[:-2]} -> {os.fsdecode(error.filename2)!s}: "
    fix = f"; {_FIXES[error.errno]}" if error.errno in _FIXES else ""
    return f"{thing}{error.strerror or error}{fix}"


def _is_ours(error: BaseException) -> bool:
    """Whether a user has to do with it: the system refused something, or this package raised it, not a library."""
    if isinstance(error, OSError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE)


def _quieten(level: int) -> None:
    # One voice: the other ranks speak up only when something is wrong.
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    level = level if rank == "0" else max(level, logging.WARNING)
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for chatty in ("httpx", "httpx2", "megatron"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Notices of torch, transformers and megatron-core about their own future, none of them for users of this program.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|megatron|transformers)\b.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron_r1reward\.parallel\.cpu")
