"""The one reader for preference data and for supervised examples.

Rows follow R1-Reward-RL: `message` (a chat as JSON), `question`, `answer`, `image`. The explicit columns `id`,
`response_1`, `response_2`, `images`, `category` and `source` win where they are present. A row that cannot be used goes
to a quarantine file with its reason; it is never fatal and never dropped in silence.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from megatron_r1reward.config.data_section import MAX_FRAMES
from megatron_r1reward.data.image_files import ImageCheck, MediaResolver
from megatron_r1reward.data.preference_row import SftExample, parse_preference, parse_sft_example, row_identifier
from megatron_r1reward.data.rows import (
    Quarantine,
    RawRow,
    RowError,
    RowOrigin,
    ZeroLabelError,
    fixed_folder,
    iterate_rows,
)
from megatron_r1reward.types import Label, Preference

logger = logging.getLogger(__name__)

_BATCH_ROWS = 1024
_ONE_SIDED = 16  # as many equal labels in a row are no accident


@dataclass(frozen=True, kw_only=True)
class _Accounting:
    """`quarantine_path` is None when every row was usable; `set_aside` are the ids of the others
    as far as they could be read."""

    quarantined: int
    quarantine_path: Path | None
    set_aside: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class ReadResult(_Accounting):
    """What a file held."""

    preferences: tuple[Preference, ...]


@dataclass(frozen=True, kw_only=True)
class SftReadResult(_Accounting):
    """As `ReadResult`, for supervised examples."""

    examples: tuple[SftExample, ...]


def read_preferences(
    path: Path,
    *,
    image_root: Path | None = None,
    image_roots: Sequence[Path] = (),
    media_dir: Path | None = None,
    quarantine: Path | None = None,
    verify_images: bool = True,
    fits: Callable[[Preference], str] | None = None,
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    rows: Iterable[RawRow] | None = None,
    unlabelled: bool = False,
    max_frames: int = MAX_FRAMES,
) -> ReadResult:
    """Read preferences from JSONL, a JSON array, Parquet file(s) or a saved `datasets` folder (see `iterate_rows`).

    Args:
        image_root: folder that relative image paths refer to and that no path may leave; default: the data's folder.
        image_roots: further folders that paths may be in.
        media_dir: folder that embedded images are written to, once each, named by content.
        quarantine: JSONL file for unusable rows; default: `<path>.quarantine.jsonl`.
        verify_images: decode every image once; otherwise only its presence is checked.
        fits: why a row cannot be used, e.g. its length, else an empty text. Asked about rows with sound images.
        convert: brings the columns of another schema into ours; ids that such a file repeats get a number.
        rows: the rows, where they do not come from `path`.
        unlabelled: take rows without an answer, or with the answer "tie": their label is None.
        max_frames: of a video.

    Raises:
        ValueError: the file is missing, damaged, of an unknown kind, without one usable row, or its labels are 0 and 1.
    """
    media = MediaResolver((image_root or fixed_folder(path), *image_roots), media_dir, max_frames=max_frames)
    source = RowSource(path=path, rows=rows if rows is not None else iterate_rows(path), convert=convert)
    parse = partial(parse_preference, ties=unlabelled)
    preferences, accounting = _read(source, parse, media, quarantine, verify_images, fits)
    labels = Counter(row.label for row in preferences if row.label is not None)
    check_labels(path, labels, text_only=sum(not row.image_paths for row in preferences))
    return ReadResult(preferences=preferences, **accounting)


def read_sft_examples(
    path: Path,
    *,
    image_root: Path | None = None,
    image_roots: Sequence[Path] = (),
    media_dir: Path | None = None,
    quarantine: Path | None = None,
    fits: Callable[[SftExample], str] | None = None,
    max_frames: int = MAX_FRAMES,
    rated: str | None = None,
) -> SftReadResult:
    """Read rows with `message` (any chat, with or without images) and `response`; else as `read_preferences`.

    Args:
        rated: the template of the pointwise model that is trained, whose rows may have a rating (`parse_sft_example`).
    """
    media = MediaResolver((image_root or fixed_folder(path), *image_roots), media_dir, max_frames=max_frames)
    source = RowSource(path=path, rows=iterate_rows(path))
    parse = partial(parse_sft_example, rated=rated)
    examples, accounting = _read(source, parse, media, quarantine, True, fits)
    return SftReadResult(examples=examples, **accounting)


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Rows, and how their columns become ours."""

    path: Path
    rows: Iterable[RawRow]
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None

    def fields(self, row: RawRow) -> Mapping[str, Any]:
        """The columns of a row.

        Raises:
            RowError: it could not be decoded, or is not of the schema.
        """
        if row.fields is None:
            raise RowError(row.error)
        if self.convert is None:
            return row.fields
        try:
            return self.convert(row.fields)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise RowError(f"a column has another form than the schema says: {error!r}") from error


ExampleT = TypeVar("ExampleT", Preference, SftExample)
_Parser = Callable[[str, Mapping[str, Any], MediaResolver], ExampleT]


def _read(
    source: RowSource,
    parse: _Parser[ExampleT],
    media: MediaResolver,
    quarantine: Path | None,
    verify_images: bool,
    fits: Callable[[ExampleT], str] | None,
) -> tuple[tuple[ExampleT, ...], dict[str, Any]]:
    """The usable rows, and the fields of `_Accounting`. Read in batches: of a row that is used nothing else is kept."""
    path = source.path
    rejected = Quarantine(quarantine or path.with_name(f"{path.name}.quarantine.jsonl"))
    taken: dict[str, tuple[int, ExampleT | None]] = {}  # id -> line, and what stands there, where ids may repeat
    usable: dict[str, ExampleT] = {}
    check = ImageCheck(media.media_dir) if verify_images else None
    zero_labels, any_second, set_aside = 0, False, set[str | None]()
    rows = iter(source.rows)
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        parsed = []
        for row in batch:
            identifier = None
            try:
                fields = source.fields(row)
                identifier = row_identifier(row, fields)
                example = parse(identifier, fields, media)
                if example.id in taken:
                    example = _another(example, taken, source)
            except RowError as error:
                rejected.add(row.origin, str(error))
                zero_labels += isinstance(error, ZeroLabelError)
                set_aside.add(identifier)
            else:
                taken[example.id] = row.origin.line, None if source.convert is None else example
                any_second = any_second or (isinstance(example, Preference) and example.label == 2)
                parsed.append((row.origin, example))
        sound = parsed if check is None else _with_sound_images(parsed, check, rejected)
        usable.update((example.id, example) for example in _that_fit(sound, rejected, fits))
    rejected.write()
    check_zero_labels(path, zero_labels, any_second)
    if not usable:
        reason = f"the first of {len(rejected)} reasons: {rejected.first_reason}" if len(rejected) else "it is empty"
        raise ValueError(f"{path}: no usable row ({reason})")
    if len(rejected):
        logger.warning("%s: %d rows are unusable, see %s", path, len(rejected), rejected.path)
    accounting = {
        "quarantined": len(rejected),
        "quarantine_path": rejected.path if len(rejected) else None,
        "set_aside": frozenset((set_aside - {None} | taken.keys()) - usable.keys()),
    }
    return tuple(usable.values()), accounting


def _that_fit(
    rows: Sequence[tuple[RowOrigin, ExampleT]], rejected: Quarantine, fits: Callable[[ExampleT], str] | None
) -> Iterator[ExampleT]:
    for origin, example in rows:
        reason = "" if fits is None else fits(example)
        if reason:
            rejected.add(origin, reason)
        else:
            yield example


def check_zero_labels(path: Path, zeros: int, any_second: bool) -> None:
    """ValueError where answers count from 0: taken row by row, half would be set aside and the other all say 1."""
    if zeros and not any_second:
        raise ValueError(
            f"{path}: answers are 0 and 1 ({zeros} times 0, never 2): write the number of the better response, "
            "1 or 2, or import the file with the schema that it has (`r1reward data import --schema`)"
        )


def check_labels(path: Path, labels: Mapping[Label, int], *, text_only: int) -> None:
    """Warn of a file whose labels are all the same, and count what has no image."""
    total = sum(labels.values())
    if total >= _ONE_SIDED and max(labels.values()) == total:
        logger.warning(
            "%s: all %d labels are %d. A model learns the place instead of the content unless the order is drawn: "
            "data.swap = 'random' does that in RL, `r1reward data import` for every stage",
            path,
            total,
            max(labels, key=lambda label: labels[label]),
        )
    if text_only:
        logger.info("%s: %d of %d rows are text only", path, text_only, total)


def _another(example: ExampleT, taken: Mapping[str, tuple[int, ExampleT | None]], source: RowSource) -> ExampleT:
    """`example` under an id of its own, where its schema may repeat ids and it says something else than the others."""
    number, name = 1, example.id
    while name in taken:
        line, other = taken[name]
        if other is None:
            raise RowError(f"duplicate id {example.id!r}, first used in line {line}")
        if replace(other, id=example.id) == example:
            raise RowError(f"the same as line {line}, id {name!r}")
        number += 1
        name = f"{example.id}#{number}"
    return replace(example, id=name)


def _with_sound_images(
    rows: Sequence[tuple[RowOrigin, ExampleT]], check: ImageCheck, rejected: Quarantine
) -> list[tuple[RowOrigin, ExampleT]]:
    special = check({path for _, row in rows for path in row.image_paths})
    kept = []
    for origin, row in rows:
        found = [special[path] for path in row.image_paths if path in special]
        problem = next((image.problem for image in found if image.problem), "")
        if problem:
            rejected.add(origin, problem)
            continue
        if found:
            row = replace(row, image_paths=tuple(special[p].path if p in special else p for p in row.image_paths))
        kept.append((origin, row))
    return kept
