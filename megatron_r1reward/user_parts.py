"""Functions and texts of the user's own that a run is made of: read once, known by content, complained about in a line.

    "rewards.py:brevity" --read_part--> Part (source, hash) --load_function--> the function
                                          `--> checkpoint, record, reward_model.json

A function is what its whole file says: a file that was edited is another part, wherever it lies. What a file imports
from its own folder is found, but is no part of it.
"""

from __future__ import annotations

import hashlib
import linecache
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

_FUNCTION = re.compile(r"(.+\.py):([A-Za-z_]\w*)")


class PartError(ValueError):
    """A user's function failed, or returned what cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A file of the user's."""

    key: str  # of the run file that named it, e.g. "prompt.parser"
    name: str  # as named: "path/to/file.py:function", or a path
    source: str  # the whole text

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @property
    def identity(self) -> str:
        """What it is, wherever it lies."""
        found = _FUNCTION.fullmatch(self.name)
        return self.sha256 if found is None else f"{found[2]} {self.sha256}"

    def described(self) -> dict[str, str]:
        """For checkpoints and records."""
        return {"name": self.name, "sha256": self.sha256, "source": self.source}


def names_a_function(text: str) -> bool:
    """Whether `text` is of the form "path/to/file.py:function"."""
    return _FUNCTION.fullmatch(text) is not None


def read_part(key: str, name: str | Path) -> Part:
    """The file that `name` names: a path, or "path/to/file.py:function".

    Raises:
        ValueError: there is no such file, or it is no text.
    """
    found = _FUNCTION.fullmatch(str(name))
    path = Path(found[1] if found else name)
    try:
        return Part(key=key, name=str(name), source=path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"{key} {str(name)!r}: {path} cannot be read ({reason}): check the path") from error


def load_function(part: Part) -> Callable[..., Any]:
    """Run the part's file and take the function from it. The file may import from its own folder.

    Raises:
        ValueError: the file does not run, or has no such function.
    """
    found = _FUNCTION.fullmatch(part.name)
    assert found is not None, part.name
    path, name = Path(found[1]), found[2]
    module = ModuleType(f"user_part_{part.sha256[:16]}")
    module.__file__ = str(path)
    # Dataclasses and pickles look their module up; tracebacks show its lines.
    sys.modules[module.__name__] = module
    linecache.cache[str(path)] = (len(part.source), None, part.source.splitlines(keepends=True), str(path))
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        exec(compile(part.source, str(path), "exec"), module.__dict__)
    except Exception as error:
        raise ValueError(f"{part.key} {part.name!r}: {path} does not run ({_told(error, path)}): mend it") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(
            f"{part.key} {part.name!r}: {path} has no function {name!r}: it has {', '.join(there) or 'none'}"
        )
    return function


def failure(part: Part, row: str, error: Exception) -> PartError:
    """What to raise where the part's function raised `error` at a row."""
    found = _FUNCTION.fullmatch(part.name)
    path = Path(found[1]) if found else Path(part.name)
    return PartError(f"{part.key} {part.name!r} failed at {row} ({_told(error, path)}): mend the function")


def _told(error: Exception, path: Path) -> str:
    """The error and the last line of the user's file on its way, in one line."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"line {places[-1]}: " if places else ""
    said = " ".join(str(error).split())
    return where + type(error).__name__ + (f": {said}" if said else "")
