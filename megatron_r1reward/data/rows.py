"""Raw rows from JSONL, JSON, Parquet and saved `datasets` folders, the one rule for the answer in a row, and the
quarantine for rows that cannot be used.
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson

from megatron_r1reward.files import LFS_POINTER, write_jsonl
from megatron_r1reward.types import Label

_BATCH_ROWS = 64  # rows with embedded images weigh a few hundred KB each
_EXCERPT_CHARACTERS = 500
_BEGINNING = 1 << 20  # bytes of a .json file that tell an array from lines
TIE = "tie"  # the answer of a row in which neither response is better
_LABEL = re.compile(r"\s*(?:<answer>\s*([12])\s*</answer>|([12]))\s*")
_SUFFIXES = (".jsonl", ".json", ".parquet")
# How files begin that hold rows in another form.
_OTHER_BYTES = {
    b"\x1f\x8b": "compressed by gzip: unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it with unzstd",
    b"\xfd7zXZ": "compressed by xz: unpack it with unxz",
    b"BZh": "compressed by bzip2: unpack it with bunzip2",
    b"PK\x03\x04": "an archive: unpack it with unzip",
    b"\xff\xfe": "UTF-16, not UTF-8: convert it, e.g. with iconv",
    b"\xfe\xff": "UTF-16, not UTF-8: convert it, e.g. with iconv",
}
# The names of splits in file and folder names, as the Hub's viewer finds them.
_SPLIT = re.compile(r"(?:^|[/_.\-])(train|test|valid|dev|eval)(?:ing|ation)?(?=[/_.\-]|$)", re.IGNORECASE)


class RowError(ValueError):
    """One row cannot be used; the message says why."""


class ZeroLabelError(RowError):
    """An answer of 0: the file may count its responses from 0."""


def label_or_none(answer: Any) -> Label | None:
    """As `label_of`; None where the answer is missing or a tie."""
    value = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    return None if value in (None, "", TIE, f"<answer>{TIE}</answer>") else label_of(answer)


def label_of(answer: Any) -> Label:
    """1 or 2 from e.g. ["<answer>2</answer>"], "2", 2 or 2.0: the one rule for `answer`.

    Raises:
        RowError: anything else.
    """
    value = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    if value is None:
        raise RowError("answer is missing")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    match = _LABEL.fullmatch(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if match is None:
        error = ZeroLabelError if str(value).strip() == "0" else RowError
        raise error(f"answer {str(answer)[:100]!r} is neither 1 nor 2")
    return 1 if "1" in match.groups() else 2


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
    """Rows of a JSONL file, a JSON array, a Parquet file, a folder of Parquet files, a saved `datasets` folder, or all
    files of a pattern such as `data/train-*.parquet`, in stored order.

    Raises:
        ValueError: `path` is none of these, a folder holds several splits, or a file is damaged or a git-lfs pointer.
    """
    if path.is_dir():
        yield from _folder_rows(path)
    elif path.is_file():
        yield from _file_rows(path, source=path.name)
    elif _is_pattern(str(path)):
        folder = fixed_folder(path)
        files = sorted(folder.glob(str(path.relative_to(folder))))
        if not files:
            raise ValueError(f"{path}: no file matches this pattern")
        for file in files:
            yield from _file_rows(file, source=str(file.relative_to(folder)))
    else:
        raise ValueError(f"{path}: no such file or folder")


def check_source(path: Path) -> None:
    """ValueError where `iterate_rows` finds nothing that it could read, without reading it all."""
    if not (path / "state.json").is_file():  # a saved data set is read by a library that takes seconds to import
        next(iterate_rows(path), None)


def is_hub_id(source: str) -> bool:
    """Whether `source` is `owner/name` of a data set on the Hub and nothing here."""
    path = Path(source)
    return re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not path.exists() and path.suffix not in _SUFFIXES


def hub_rows(name: str, split: str) -> Iterator[RawRow]:
    """Rows of one split of a data set on the Hub, streamed.

    Raises:
        ValueError: there is no such data set or split, or no Hub.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split, streaming=True)
        batches = iter(dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS))
        yield from _table_rows(batches, f"{name}/{split}", Path(name))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name}: neither a file here nor a data set that the Hub gives ({error})") from error


def fixed_folder(path: Path) -> Path:
    """The folder of a source: itself, a file's folder, or the part of a pattern before its first wildcard."""
    if path.is_dir():
        return path
    for parent in (path, *path.parents):
        if not _is_pattern(str(parent)):
            return parent.parent if parent == path else parent
    return Path()


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _file_rows(path: Path, source: str) -> Iterator[RawRow]:
    with path.open("rb") as file:
        beginning = file.read(len(LFS_POINTER))
    if beginning == LFS_POINTER:
        raise ValueError(f"{path}: a git-lfs pointer, not the data: run `git lfs pull`")
    for bytes_, problem in _OTHER_BYTES.items():
        if beginning.startswith(bytes_):
            raise ValueError(f"{path}: {problem}")
    if path.suffix == ".jsonl":
        yield from _jsonl_rows(path, source)
    elif path.suffix == ".json":
        yield from _json_rows(path, source)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path, source)
    else:
        raise ValueError(
            f"{path}: unknown kind of data {path.suffix!r}: give .jsonl, .json, .parquet or a datasets folder"
        )


def _folder_rows(folder: Path) -> Iterator[RawRow]:
    files = sorted(folder.rglob("*.parquet"))
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        raise ValueError(f"{folder}: a dataset with splits {splits}: give the folder of one split")
    if (folder / "state.json").is_file():
        import datasets  # takes a second to import, which readers of JSONL need not wait for

        yield from _table_rows(_dataset_batches(datasets.load_from_disk(str(folder))), folder.name, folder)
    elif files:
        _refuse_several_splits(folder, files)
        for file in files:
            yield from _file_rows(file, source=str(file.relative_to(folder)))
    else:
        others = {path.suffix for path in folder.iterdir()} & {".jsonl", ".json"}
        hint = f"; give one of its {others.pop()} files, or a pattern of their names" if others else ""
        raise ValueError(f"{folder}: neither Parquet files nor a saved datasets folder{hint}")


def _refuse_several_splits(folder: Path, files: list[Path]) -> None:
    splits = defaultdict(list)
    for file in files:
        found = _SPLIT.search(file.name) or _SPLIT.search(str(file.relative_to(folder).parent))
        if found is not None:
            splits[found[1].lower()].append(str(file))
    if len(splits) > 1:
        held = ", ".join(f"{len(names)} of {split}" for split, names in splits.items())
        name = next(iter(splits.values()))[0]
        pattern = name[: _SPLIT.search(name, len(str(folder))).end()] + "*"  # type: ignore[union-attr]
        raise ValueError(f"{folder}: files of several splits ({held}): give those of one, e.g. '{pattern}'")


def _jsonl_rows(path: Path, source: str) -> Iterator[RawRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            excerpt = line[:_EXCERPT_CHARACTERS].decode("utf-8", errors="replace").rstrip("\n")
            origin = RowOrigin(source=source, line=number, excerpt=excerpt)
            try:
                fields = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
            except _TwiceError as error:
                yield RawRow(origin=origin, fields=None, error=str(error))
                continue
            except (ValueError, RecursionError) as error:
                yield RawRow(origin=origin, fields=None, error=f"malformed JSON: {error}")
                continue
            if isinstance(fields, dict):
                yield RawRow(origin=origin, fields=fields)
            else:
                yield RawRow(origin=origin, fields=None, error=f"not a JSON object but {type(fields).__name__}")


class _TwiceError(ValueError):
    """A key stands twice in one object: nobody knows which of its values is meant."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key!r} stands twice in it")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return fields


class _Streamed(dict[str, Any]):
    """An object that is read key by key; an error in there would end the whole array."""

    twice: str | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self:
            self.twice = key
        super().__setitem__(key, value)


def _checked(value: Any) -> Any:
    """The same in plain dictionaries.

    Raises:
        _TwiceError: a key stands twice in an object of it.
    """
    if isinstance(value, list):
        return [_checked(item) for item in value]
    if not isinstance(value, _Streamed):
        return value
    if value.twice is not None:
        raise _TwiceError(value.twice)
    return {key: _checked(item) for key, item in value.items()}


def _json_rows(path: Path, source: str) -> Iterator[RawRow]:
    """Rows of one JSON array of objects, streamed; their line is their place in it. Others call JSON lines so, too."""
    with path.open("rb") as file:
        begins = file.read(_BEGINNING).removeprefix(codecs.BOM_UTF8).lstrip()
    if begins[:1] == b"{" and _is_object(begins.partition(b"\n")[0]):
        yield from _jsonl_rows(path, source)
        return
    number = 0
    try:
        with path.open("rb") as file:
            if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
                file.seek(0)
            for number, item in enumerate(ijson.items(file, "item", use_float=True, map_type=_Streamed), start=1):
                origin = RowOrigin(source=source, line=number, excerpt=_EXCERPTS.repr(item)[:_EXCERPT_CHARACTERS])
                try:
                    fields = _checked(item)
                except _TwiceError as error:
                    yield RawRow(origin=origin, fields=None, error=str(error))
                    continue
                if isinstance(fields, dict):
                    yield RawRow(origin=origin, fields=fields)
                else:
                    yield RawRow(origin=origin, fields=None, error=f"not a JSON object but {type(fields).__name__}")
    except ijson.JSONError as error:
        reason = " ".join(str(error).split("\n")[0].split())  # what follows is a picture of the place
        raise ValueError(f"{path}: malformed JSON after row {number} ({reason})") from error
    if number == 0 and begins[:1] not in (b"[", b""):
        raise ValueError(f"{path}: not a JSON array of rows: give one, or JSONL")


def _is_object(line: bytes) -> bool:
    """Whether a line may be a row of its own: a whole object, or the beginning of a long one."""
    if len(line) >= _BEGINNING - len(codecs.BOM_UTF8):
        return True
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parquet_rows(path: Path, source: str) -> Iterator[RawRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            yield from _table_rows(file.iter_batches(batch_size=_BATCH_ROWS), source, path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged Parquet file ({error}): download it again") from error


def _dataset_batches(dataset: Any) -> Iterator[Any]:
    """Tables of a `datasets` object, image columns as stored instead of decoded."""
    return iter(dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS) if len(dataset) else ())


def _table_rows(batches: Iterator[Any], source: str, path: Path) -> Iterator[RawRow]:
    line = 0
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

    repr__Streamed = reprlib.Repr.repr_dict  # noqa: N815  # reprlib finds it by the name of the class


_EXCERPTS = _ExcerptRepr()
_EXCERPTS.maxstring = _EXCERPTS.maxother = 120
_EXCERPTS.maxdict = 16
