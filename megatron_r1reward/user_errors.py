"""What every command does with its errors: a user's mistake is one line with thing, value and fix, and exit code 2."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import traceback
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
# Words of torch, safetensors, SQLite and Python about what a user can mend.
_MACHINE = (
    (
        r"out of memory|OutOfMemoryError|can't allocate memory|not enough memory|^MemoryError",
        "lower data.token_budget or data.max_pixels, set parallel.recompute, or use more GPUs; "
        "`r1reward plan RUN.toml` says what fits",
    ),
    (r"EADDRINUSE|[Aa]ddress already in use", _FIXES[errno.EADDRINUSE]),
    (r"No space left on device|database or disk is full|os error 28", _FIXES[errno.ENOSPC]),
    (r"Disk quota exceeded|os error 122", _FIXES[errno.EDQUOT]),
    (r"Read-only file system|readonly database|os error 30", _FIXES[errno.EROFS]),
)


@contextmanager
def user_errors(*, level: int = logging.INFO, component: bool = False) -> Iterator[None]:
    """Around the body of a command: sets up logging, and turns what the user can mend into one line on standard error.

    ValueError is a user's mistake by the rule of this code; so are the system's refusals (OSError) and what this
    package itself gives up with (RuntimeError raised in it: no server answers, a checkpoint is damaged), and what
    libraries say about a machine that is full (`machine_line`). Other errors of libraries and failed assertions keep
    their traceback and exit code 1.

    Args:
        level: of the log.
        component: a rank or a server, whose log is read by whoever looks for a fault: only ValueError is a line there,
            and a full machine a line after its traceback.
    """
    _quieten(level)
    try:
        yield
    except (typer.Exit, typer.Abort):  # an exit code on its way, which is a RuntimeError too
        raise
    except Exception as error:
        if (line := machine_line(error)) is not None:
            if component:
                traceback.print_exc()
            tell(line)
        elif not isinstance(error, ValueError) and (component or not _is_ours(error)):
            raise
        else:
            tell(one_line(error))
        sys.exit(EXIT_USER_ERROR)


def check_file(path: Path) -> None:
    """ValueError unless it is a file, before anything is imported that would read it."""
    if not path.is_file():
        raise ValueError(
            f"{path} is {'a folder' if path.is_dir() else 'not there'}: {_FIXES[errno.ENOENT]}, name a file"
        )


def tell(line: str) -> None:
    """The line, red on a terminal. Nothing in it is read as markup."""
    line = f"error: {line}"
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


def machine_line(error: BaseException) -> str | None:
    """What is wrong and what to do, where a library says in its own words that the machine has no more memory, disk or
    that port. None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return None  # `one_line` has it, with the file
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    fix = next((fix for pattern, fix in _MACHINE if re.search(pattern, text)), None)
    if fix is None or isinstance(error, ValueError):
        return None
    # The first of a list of reports (one per rank); torch's advice about its allocator helps in rare cases only.
    text = re.split(r"Of the allocated memory|Exception raised from|\n", text, maxsplit=1)[0].strip().rstrip(". ")
    return f"{text}: {fix}"


def _is_ours(error: BaseException) -> bool:
    """Whether a user has to do with it: the system refused something, or this package raised it, not a library."""
    if isinstance(error, OSError):
        return True
    if not isinstance(error, RuntimeError):
        return False
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
