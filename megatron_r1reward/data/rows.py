"""Raw rows from JSONL, Parquet and saved `datasets` folders, and the quarantine for those that cannot be used."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1reward.files import write_jsonl

_BATCH_ROWS = 64  # rows with embedded images weigh a few hundred KB each
_EXCERPT_CHARACTERS = 500


class RowError(ValueError):
    """One row cannot be used; the message says why."""


@dataclass(frozen=True, kw_only=True)
class RowOrigin:
    """Where a row came from: file, 1-based line (row for Parquet), and the beginning of its text."""

    source: str
    line: int
    excerpt: str


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """One row as stored. `fields` is None where the row could not be decoded; `error` then says why."""

    origin: RowOrigin
    fields: Mapping[str, Any] | None
    error: str = ""


class Quarantine:
    """Collects unusable rows and writes them, with their reasons, to one JSONL file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: list[tuple[RowOrigin, str]] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def first_reason(self) -> str:
        return self._rows[0][1] if self._rows else ""

    def add(self, origin: RowOrigin, reason: str) -> None:
        self._rows.append((origin, reason))

    def write(self) -> None:
        """Write the rows in file order; a file of an earlier read is replaced even when there are none."""
        if not self._rows and not self.path.exists():
            return
        self._rows.sort(key=lambda row: (row[0].source, row[0].line))
        write_jsonl(
            self.path,
            (
                {"source": origin.source, "line": origin.line, "reason": reason, "row": origin.excerpt}
                for origin, reason in self._rows
            ),
        )


def iterate_rows(path: Path) -> Iterator[RawRow]:
    """Rows of a JSONL file, a Parquet file, a folder of Parquet files or a saved `datasets` folder, in stored order.

    Raises:
        ValueError: `path` is none of these, or a Parquet or Arrow file is damaged.
    """
    if path.is_dir():
        yield from _folder_rows(path)
    elif not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    elif path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path, source=path.name)
    else:
        raise ValueError(f"{path}: unknown kind of data {path.suffix!r}: give .jsonl, .parquet or a datasets folder")


def _folder_rows(folder: Path) -> Iterator[RawRow]:
    files = sorted(folder.rglob("*.parquet"))
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise ValueError(f"{folder}: a dataset with splits {splits}: give the folder of one split")
    if (folder / "state.json").is_file():
        import datasets  # takes a second to import, which readers of JSONL need not wait for

        yield from _table_rows(datasets.load_from_disk(str(folder)), source=folder.name, path=folder)
    elif files:
        for file in files:
            yield from _parquet_rows(file, source=str(file.relative_to(folder)))
    else:
        raise ValueError(f"{folder}: neither Parquet files nor a saved datasets folder")


def _jsonl_rows(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            excerpt = line[:_EXCERPT_CHARACTERS].decode("utf-8", errors="replace").rstrip("\n")
            origin = RowOrigin(source=path.name, line=number, excerpt=excerpt)
            try:
                fields = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield RawRow(origin=origin, fields=None, error=f"malformed JSON: {error}")
                continue
            if isinstance(fields, dict):
                yield RawRow(origin=origin, fields=fields)
            else:
                yield RawRow(origin=origin, fields=None, error=f"not a JSON object but {type(fields).__name__}")


def _parquet_rows(path: Path, source: str) -> Iterator[RawRow]:
    import datasets

    try:
        # Streaming, because a cached copy would double the disk space of embedded images.
        dataset = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path}: damaged Parquet file ({error}): download it again") from error
    yield from _table_rows(dataset, source=source, path=path)


def _table_rows(dataset: Any, source: str, path: Path) -> Iterator[RawRow]:
    """Rows of a `datasets` object through Arrow, which leaves image columns as stored instead of decoding them."""
    line = 0
    batches = dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS)
    while True:
        try:
            table = next(batches, None)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}: damaged after row {line} ({error}): download it again") from error
        if table is None:
            return
        for fields in table.to_pylist():
            line += 1
            origin = RowOrigin(source=source, line=line, excerpt=_EXCERPTS.repr(fields)[:_EXCERPT_CHARACTERS])
            yield RawRow(origin=origin, fields=fields)


class _ExcerptRepr(reprlib.Repr):
    """A bounded repr that names the size of embedded images instead of printing them."""

    def repr_bytes(self, value: bytes, level: int) -> str:
        return f"<{len(value)} bytes>"


_EXCERPTS = _ExcerptRepr()
_EXCERPTS.maxstring = _EXCERPTS.maxother = 120
_EXCERPTS.maxdict = 16
