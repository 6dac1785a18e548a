"""A source read in batches by several processes, each batch's rows kept in a file of their own until the import ends.

    rows --batches--> processes: convert, check, decode images, hash --> OUT/.parts/NUMBER-CONTENT.jsonl, in order

A part is named by what its rows say and how they are read, and appears whole. An import that was killed uses the parts
that are there; those that hold refused rows are read again, because the reason, e.g. a missing image, may be mended.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from megatron_r1reward.data.image_files import Examined, MediaResolver, examine_images
from megatron_r1reward.data.near_duplicates import Pictures, near_keys, pair_key, question_key, short_key
from megatron_r1reward.data.preference import RowSource
from megatron_r1reward.data.preference_row import parse_preference, row_identifier
from megatron_r1reward.data.rows import RawRow, RowError, RowOrigin, ZeroLabelError
from megatron_r1reward.data.schemas import SCHEMAS
from megatron_r1reward.files import write_jsonl
from megatron_r1reward.processes import die_with_parent
from megatron_r1reward.types import Preference

_FORMAT = 4  # of the parts; those of another version are read again
BATCH_ROWS = 256  # embedded images of a few hundred KB make 100 MB of it


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows are read. `from_one`: winners that the source counts from 0 are counted from 1."""

    schema: str
    from_one: bool
    roots: tuple[Path, ...]
    media_dir: Path
    max_frames: int

    @property
    def convert(self) -> Callable[[Mapping[str, Any]], Mapping[str, Any]] | None:
        if self.schema == "r1_reward":
            return None
        convert = SCHEMAS[self.schema].convert
        return _from_one(convert) if self.from_one else convert


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """A row that was read: a preference, or the reason why there is none.

    `question`, `pair` (64 bits of it) and `near` are the keys of `near_duplicates`, `pictures` its thumbnails.
    """

    origin: RowOrigin
    preference: Preference | None
    reason: str
    zero_label: bool
    question: bytes = b""
    pair: int = 0
    near: tuple[int, ...] = ()
    pictures: Pictures = ()


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """A preference, or the reason why the row is none; `zero_label`: because its answer is 0."""

    origin: RowOrigin
    preference: Preference | None
    reason: str = ""
    zero_label: bool = False
    pictures: Pictures = ()


def _read_batch(
    rows: Iterable[RawRow],
    *,
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None,
    roots: Sequence[Path],
    media_dir: Path,
    max_frames: int,
) -> list[BatchRow]:
    """Some rows of a source in their order, every image decoded once. Whether ids repeat is for the caller to see."""
    source = RowSource(path=Path(), rows=(), convert=convert)
    media = MediaResolver(roots, media_dir, max_frames=max_frames)
    found: list[BatchRow] = []
    for row in rows:
        try:
            fields = source.fields(row)
            preference = parse_preference(row_identifier(row, fields), fields, media)
            _check_different(preference)
        except RowError as error:
            zero = isinstance(error, ZeroLabelError)
            found.append(BatchRow(origin=row.origin, preference=None, reason=str(error), zero_label=zero))
        else:
            found.append(BatchRow(origin=row.origin, preference=preference))
    paths = (path for row in found if row.preference is not None for path in row.preference.image_paths)
    examined = examine_images(paths, media_dir, thumbnails=True)
    return [row if row.preference is None else _examined(row, row.preference, examined) for row in found]


def _check_different(preference: Preference) -> None:
    """RowError where there is nothing to prefer: a model would learn to toss a coin."""
    shown = preference.exchanged()
    if (preference.responses, preference.image_paths) == (shown.responses, shown.image_paths):
        raise RowError("the two responses are the same: neither is better")


def _examined(row: BatchRow, preference: Preference, examined: Mapping[str, Examined]) -> BatchRow:
    images = [examined[path] for path in preference.image_paths]
    problem = next((image.problem for image in images if image.problem), "")
    if problem:
        return BatchRow(origin=row.origin, preference=None, reason=problem)
    return replace(
        row,
        preference=replace(preference, image_paths=tuple(image.path for image in images)),
        pictures=tuple(image.thumbnail for image in images),
    )


def read_parts(rows: Iterable[RawRow], folder: Path, reading: Reading, *, processes: int) -> Iterator[PartRow]:
    """The rows in their order, once all parts are there; at most two batches per process are in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    said = json.dumps([_FORMAT, asdict(reading)], default=str).encode()
    there = {path.name for path in folder.iterdir()}
    batches = _batches(rows)
    first = list(itertools.islice(batches, 2))
    names = []
    with _Pool(processes if len(first) > 1 else 1) as pool:
        for number, batch in enumerate(itertools.chain(first, batches)):
            payload = pickle.dumps(batch)
            name = f"{number:06}-{xxhash.xxh3_128_hexdigest(said + payload)}.jsonl"
            names.append(name)
            if name not in there:
                pool.submit(payload, reading, folder / name)
    for name in names:
        path = folder / name
        with (path if path.exists() else _with_refused(path)).open(encoding="utf-8") as lines:
            yield from map(_part_row, lines)


def _batches(rows: Iterable[RawRow]) -> Iterator[list[RawRow]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        yield batch


class _Pool:
    """Processes that read batches; submitting waits while each of them has two to do. One process is this one."""

    def __init__(self, processes: int) -> None:
        self._most = 2 * processes
        self._waiting: deque[Future[None]] = deque()
        # Not forked: this process may have threads, of pyarrow for one.
        context = multiprocessing.get_context("spawn")
        # Of a parent that is killed its queue alone would tell nothing: its processes would wait for ever.
        self._pool = (
            ProcessPoolExecutor(processes, mp_context=context, initializer=die_with_parent, initargs=(os.getpid(),))
            if processes > 1
            else None
        )

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            if kind is None:
                for future in self._waiting:
                    _finish(future)
            self._pool.shutdown(cancel_futures=True)

    def submit(self, payload: bytes, reading: Reading, path: Path) -> None:
        if self._pool is None:
            _read_part(payload, reading, path)
            return
        while len(self._waiting) >= self._most:
            _finish(self._waiting.popleft())
        self._waiting.append(self._pool.submit(_read_part, payload, reading, path))


def _finish(future: Future[None]) -> None:
    try:
        future.result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a process of the import was killed, for want of memory as a rule: run the same command again, it goes on "
            "where it stopped, with fewer --processes"
        ) from error


def _read_part(payload: bytes, reading: Reading, path: Path) -> None:
    batch = _read_batch(
        pickle.loads(payload),
        convert=reading.convert,
        roots=reading.roots,
        media_dir=reading.media_dir,
        max_frames=reading.max_frames,
    )
    lines, refused = [], False
    for row in batch:
        preference = row.preference
        refused = refused or preference is None
        lines.append(
            {
                "origin": vars(row.origin),
                "preference": None if preference is None else vars(preference),
                "reason": row.reason,
                "zero_label": row.zero_label,
                "question": "" if preference is None else question_key(preference).hex(),
                "pair": 0 if preference is None else int.from_bytes(pair_key(preference)[:8], "little"),
                "near": () if preference is None else near_keys(preference),
                "pictures": [picture.hex() for picture in row.pictures],
            }
        )
    write_jsonl(_with_refused(path) if refused else path, lines)


def _with_refused(path: Path) -> Path:
    return path.with_suffix(".refused.jsonl")


def _part_row(line: str) -> PartRow:
    fields = json.loads(line)
    found = fields["preference"]
    return PartRow(
        origin=RowOrigin(**fields["origin"]),
        preference=None if found is None else preference_of(found),
        reason=fields["reason"],
        zero_label=fields["zero_label"],
        question=bytes.fromhex(fields["question"]),
        pair=fields["pair"],
        near=tuple(fields["near"]),
        pictures=tuple(map(bytes.fromhex, fields["pictures"])),
    )


def preference_of(fields: Mapping[str, Any]) -> Preference:
    """A preference from its fields in JSON."""
    return Preference(
        **{**fields, **{name: tuple(fields[name]) for name in ("responses", "image_paths", "response_images")}}
    )


def content_key(preference: Preference) -> int:
    """64 bits of all that a row says but its id."""
    return short_key(json.dumps(vars(replace(preference, id="")), sort_keys=True, ensure_ascii=True))


def _from_one(convert: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Callable[..., Mapping[str, Any]]:
    """`convert`, with winners that count from 0 counted from 1."""

    def counted(fields: Mapping[str, Any]) -> Mapping[str, Any]:
        row = convert(fields)
        try:
            return {**row, "answer": int(float(row["answer"])) + 1}
        except (TypeError, ValueError):
            return row  # a name, or nothing: the reader says what is wrong

    return counted
