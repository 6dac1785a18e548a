"""Bring any supported preference file into one folder: checked rows, embedded images as files, bad rows set aside."""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_r1reward.config.data_section import MAX_FRAMES
from megatron_r1reward.data.image_files import examine_images
from megatron_r1reward.data.import_parts import PartRow, Reading, read_parts
from megatron_r1reward.data.near_duplicates import Seen, pictures_of, question_key
from megatron_r1reward.data.preference import check_labels, check_zero_labels
from megatron_r1reward.data.prompt import messages_of
from megatron_r1reward.data.repeats import MergedRows, Repeats, find_repeats
from megatron_r1reward.data.rows import RawRow, RowOrigin, fixed_folder, hub_rows, is_hub_id, iterate_rows, label_of
from megatron_r1reward.data.schemas import SCHEMAS, Schema, counts_from_zero, detect, nearest
from megatron_r1reward.data.set_figures import SetFigures
from megatron_r1reward.files import atomic_path, remove_leftovers, write_text
from megatron_r1reward.types import Preference

log = logging.getLogger(__name__)
_LOOKED_AT = 64  # rows of which one has to say what schema a source has

Order = Literal["auto", "drawn", "stored"]


def preference_row(preference: Preference) -> dict[str, Any]:
    """The R1-Reward-RL row of a preference, with its parts as explicit columns and absolute image paths."""
    messages = messages_of(preference)
    paths = iter(preference.image_paths)
    for part in messages[0]["content"]:
        if part["type"] == "image":
            part["image"] = next(paths)
    return {
        "id": preference.id,
        "message": json.dumps(messages, ensure_ascii=False),
        "question": preference.question,
        "response_1": preference.responses[0],
        "response_2": preference.responses[1],
        "answer": [f"<answer>{preference.known_label}</answer>"],
        "images": list(preference.image_paths),
        **({"response_images": list(preference.response_images)} if any(preference.response_images) else {}),
        **preference.metadata,
    }


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What an import wrote; the rows themselves are read from `path` when they are asked for."""

    path: Path
    rows: int
    quarantined: int
    quarantine_path: Path | None  # None when every row was usable
    account: Mapping[str, Any]  # `import.json`

    @property
    def preferences(self) -> tuple[Preference, ...]:
        with self.path.open(encoding="utf-8") as lines:
            return tuple(_preference_of(json.loads(line)) for line in lines)


def import_preferences(
    source: str | Path,
    out: Path,
    *,
    schema: str = "auto",
    image_root: Path | None = None,
    image_roots: Sequence[Path] = (),
    split: str = "train",
    order: Order = "auto",
    seed: int = 0,
    processes: int = 1,
    max_frames: int = MAX_FRAMES,
    remove_duplicates: bool = False,
    remove_near_duplicates: bool = False,
    remove_overlap_with: Sequence[str] = (),
) -> ImportResult:
    """Write `preferences.jsonl`, `media/` (images that were embedded), `quarantine.jsonl` and `import.json` into `out`.

    Streamed: of a row that was read only hashes stay in memory, about 150 bytes. A killed import goes on with what it
    has read.

    Args:
        source: what `iterate_rows` takes, or the id of a data set on the Hub.
        schema: one of `SCHEMAS`; "auto" looks at the first rows.
        split: of a data set on the Hub.
        order: "drawn" draws which response stands first, with as many labels 1 as 2; "stored" keeps the source's order;
            "auto" draws where the source names its responses by their quality or has one label only.
        processes: that convert, check and decode.
        max_frames: of a video.
        remove_duplicates: set aside pairs that occur again, the responses in any order, see `near_duplicates`.
        remove_near_duplicates: likewise pairs that differ by one word from an earlier one.
        remove_overlap_with: benchmarks, or other sources; rows with a question of theirs about the same pictures are
            set aside.

    Raises:
        ValueError: `source` cannot be read, is of no known schema, or holds no usable row.
    """
    hub = is_hub_id(str(source))
    if hub and out.resolve() == Path(source).resolve():
        raise ValueError(f"--out {out} would be a folder of the data set's name, and taken for it: choose another one")
    out.mkdir(parents=True, exist_ok=True)
    path, parts = Path(source), out / ".parts"
    for folder in (out, out / "media"):
        remove_leftovers(folder)

    def rows() -> Iterator[RawRow]:
        return hub_rows(str(source), split) if hub else iterate_rows(path)

    chosen = schema_of(rows(), source, schema)
    root = image_root or (Path.cwd() if hub else fixed_folder(path))
    reading = Reading(
        schema=chosen.name,
        from_one=chosen.name == "pairwise" and counts_from_zero(row.fields for row in rows()),
        roots=(root, *image_roots),
        media_dir=out / "media",
        max_frames=max_frames,
    )
    overlap = {other: _asked_in(other) for other in remove_overlap_with}
    draw = order == "drawn" or (None if order == "auto" and not chosen.better_first else order == "auto")
    parts.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parts) as scratch, closing(MergedRows(Path(scratch))) as merged:
        counts = _merge(read_parts(rows(), parts, reading, processes=processes), merged, overlap)
        repeats = find_repeats(
            merged,
            ids_repeat=reading.convert is not None,
            remove_duplicates=remove_duplicates,
            remove_near_duplicates=remove_near_duplicates,
        )
        account = _write_set(out, path, merged, repeats, counts, draw=draw, seed=seed)
    account = {"source": str(source), "schema": chosen.name, **account}
    write_text(out / "import.json", json.dumps(account, indent=2) + "\n")
    shutil.rmtree(parts)
    return ImportResult(
        path=out / "preferences.jsonl",
        rows=account["rows"],
        quarantined=account["quarantined"],
        quarantine_path=out / "quarantine.jsonl" if account["quarantined"] else None,
        account=account,
    )


@dataclass(kw_only=True)
class _Counts:
    """Of what was read: answers of 0, refused rows, and rows that a benchmark asks, by its name."""

    zero_labels: int = 0
    refused: int = 0
    overlap: Counter[str] = field(default_factory=Counter)


def _merge(parts: Iterable[PartRow], merged: MergedRows, overlap: Mapping[str, Seen]) -> _Counts:
    """Collect the rows of all parts, without what benchmarks ask."""
    counts = _Counts()
    for row in parts:
        counts.zero_labels += row.zero_label
        reason = row.reason
        if row.preference is not None:
            name = next((name for name, asked in overlap.items() if asked.holds(row.question, row.pictures)), None)
            if name is None:
                merged.add(row, row.preference)
                continue
            counts.overlap[name] += 1
            reason = f"the same question about images that look the same is in {name}"
        counts.refused += 1
        merged.refuse(row.origin, reason)
    merged.close()
    return counts


def _placed(rows: MergedRows, repeats: Repeats) -> Iterator[tuple[RowOrigin, Preference | None, str]]:
    """The rows in order under their own ids; what says the same as an earlier one is refused where that is wanted."""
    place = -1
    for origin, preference, reason in rows.all():
        if preference is not None:
            place += 1
            reason = repeats.refused.get(place, "")
            preference = None if reason else replace(preference, id=repeats.names.get(place, preference.id))
        yield origin, preference, reason


def _write_set(
    out: Path, source: Path, merged: MergedRows, repeats: Repeats, counts: _Counts, *, draw: bool | None, seed: int
) -> dict[str, Any]:
    """Quarantine and preferences; the account of them. `draw` None: where all labels are the same."""
    number, labels, text_only = repeats.kept(merged)
    refused = counts.refused + len(repeats.refused)
    reason = _set_aside(_placed(merged, repeats), out / "quarantine.jsonl")
    check_zero_labels(source, counts.zero_labels, labels[2] > 0)
    if not number:
        said = f"the first of {refused} reasons: {reason}" if refused else "it is empty"
        raise ValueError(f"{source}: no usable row ({said})")
    if refused:
        log.warning("%s: %d rows are set aside, see %s", source, refused, out / "quarantine.jsonl")
    drawn = len(labels) == 1 if draw is None else draw
    wanted = np.random.default_rng(seed).permutation(number) % 2 + 1 if drawn else None
    kept = (preference for _, preference, _ in _placed(merged, repeats) if preference is not None)
    written = _write_rows(kept, out / "preferences.jsonl", wanted)
    if not drawn:
        check_labels(source, labels, text_only=text_only)
    return {
        "order": f"drawn, seed {seed}" if drawn else "as stored",
        "rows": number,
        **written,
        "text_only": text_only,
        "quarantined": refused,
        "duplicates": len(repeats.duplicates),
        "near_duplicates": len(repeats.near_duplicates),
        "overlap": counts.overlap,
    }


def _set_aside(rows: Iterable[tuple[RowOrigin, Preference | None, str]], path: Path) -> str:
    """Write the refused ones to `path`; without any there is no file. Returns the first reason."""
    first: str | None = None
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as sink:
        for origin, preference, reason in rows:
            if preference is None:
                first = reason if first is None else first
                line = {"source": origin.source, "line": origin.line, "reason": reason, "row": origin.excerpt}
                sink.write(json.dumps(line, ensure_ascii=False) + "\n")
    if first is None:
        path.unlink()
    return first or ""


def _write_rows(preferences: Iterable[Preference], path: Path, wanted: np.ndarray | None) -> dict[str, Any]:
    """Our rows, with the label `wanted` for each; their figures, and how many changed places for that."""
    figures, exchanged = SetFigures(), 0
    with atomic_path(path) as temporary, temporary.open("w") as sink:
        for place, row in enumerate(preferences):
            change = wanted is not None and row.label != int(wanted[place])
            if change:
                row = row.exchanged()
            figures.add(row, exchanged=change)
            exchanged += change
            sink.write(json.dumps({**preference_row(row), "exchanged": change}, ensure_ascii=False) + "\n")
    balance = figures.to_json()
    return {"labels": balance["labels"], "exchanged": exchanged, "balance": balance}


def _preference_of(row: Mapping[str, Any]) -> Preference:
    """The preference of a row that `preference_row` made."""
    return Preference(
        id=row["id"],
        question=row["question"],
        responses=(row["response_1"], row["response_2"]),
        label=label_of(row["answer"]),
        image_paths=tuple(row["images"]),
        metadata={key: row[key] for key in ("category", "source") if key in row},
        response_images=tuple(row.get("response_images", (0, 0))),
    )


def _asked_in(source: str) -> Seen:
    """What a benchmark asks about which pictures."""
    with tempfile.TemporaryDirectory() as scratch:
        held = import_preferences(source, Path(scratch), order="stored").preferences
        thumbnails = thumbnails_of(held)
        return Seen((question_key(row), pictures_of(row, thumbnails)) for row in held)


def thumbnails_of(preferences: Sequence[Preference]) -> dict[str, bytes]:
    """Of all their pictures, by path."""
    examined = examine_images((path for row in preferences for path in row.image_paths), None, thumbnails=True)
    return {path: image.thumbnail for path, image in examined.items()}


def schema_of(rows: Iterable[RawRow], source: str | Path, name: str = "auto") -> Schema:
    """The schema `name` where the first rows have it; that which one of them has for "auto".

    Raises:
        ValueError: no row is readable or of a schema; names the nearest and what the first row lacks.
    """
    if name != "auto" and name not in SCHEMAS:
        raise ValueError(f"--schema {name!r}: give auto or one of {', '.join(SCHEMAS)}")
    reason, found, problem = "it is empty", False, None
    for row in itertools.islice(rows, _LOOKED_AT):
        if row.fields is None:
            reason = reason if reason != "it is empty" else f"line {row.origin.line}: {row.error}"
            continue
        found = True
        try:
            return _fitting(row.fields, name)
        except ValueError as error:  # a row without an answer, say, must not decide about all the others
            problem = problem or error
    if not found:
        raise ValueError(f"{source}: no readable row: {reason}")
    raise ValueError(f"{source}: {problem}") from problem


def _fitting(fields: Mapping[str, Any], name: str) -> Schema:
    if name == "auto":
        return detect(fields)
    missing = SCHEMAS[name].missing({column for column, value in fields.items() if value is not None})
    if missing:
        columns = sorted(fields)
        raise ValueError(f"schema {name} needs {', '.join(missing)}, the first row has {columns}: {nearest(columns)}")
    return SCHEMAS[name]
