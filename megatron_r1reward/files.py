"""Atomic files: a reader sees the old file or the whole new one, never a part."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs"  # the beginning of what git checks out without git-lfs
_TEMPORARY = re.compile(r"\..+-[0-9a-f]{16}(?:\.[^.]*)?")  # the names that `atomic_path` gives


@contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes `path`'s place when the block ends without an exception.

    `durable` waits for the disk, so that the promise holds across a power failure too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept, because image writers choose their format by it.
    temporary = path.with_name(f".{path.stem[:100]}-{secrets.token_hex(8)}{path.suffix}")
    # Not by tempfile, whose files are for their owner alone: here the umask decides who reads them.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that `atomic_path` left in a folder when its process was killed; for whoever is the
    only one to write there."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which goes when the block ends. A killed process holds it no longer.

    Raises:
        BlockingIOError: another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                break  # else its last holder has just removed it
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def publish_folder(staging: Path, out: Path) -> None:
    """Give a finished folder its name, durably. A folder that has the name already goes only when this one is there."""
    for path in (*staging.rglob("*"), staging):
        sync(path)
    old = out.with_name(out.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.replace(old)
    staging.replace(out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    # An unpaired surrogate, e.g. in a quarantined row, becomes `\\udXXX`, which is its JSON escape.
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def recover_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a record that grows line by line; none where there is no such file. Whoever was killed while it
    wrote left a torn line at the end: the file is written anew without it, so that the next line stands alone."""
    if not path.exists():
        return []
    rows, whole = [], True
    content = path.read_bytes()
    for line in content.split(b"\n"):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:  # JSONDecodeError, or bytes that are no text
            whole = False
            continue
        if isinstance(row, dict):
            rows.append(row)
        else:
            whole = whole and row is None
    if not whole or (content and not content.endswith(b"\n")):
        write_jsonl(path, rows)
    return rows


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it is torn or no JSON; names the file and the place.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # JSONDecodeError, or bytes that are no text
        raise ValueError(f"{path} is not JSON ({error}): it is torn or was edited; write or copy it again") from error
