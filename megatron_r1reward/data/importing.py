"""Bring any supported preference file into one folder: checked rows, embedded images as files, bad rows set aside."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from megatron_r1reward.data.image_files import examine_images
from megatron_r1reward.data.import_parts import PartRow, Reading, preference_of, read_parts
from megatron_r1reward.data.near_duplicates import Seen, pictures_of, question_key
from megatron_r1reward.data.preference import check_labels, check_zero_labels, label_of
from megatron_r1reward.data.prompt import preference_messages
from megatron_r1reward.data.rows import RawRow, RowError, fixed_folder, hub_rows, is_hub_id, iterate_rows
from megatron_r1reward.data.schemas import SCHEMAS, Schema, counts_from_zero, detect, nearest
from megatron_r1reward.files import atomic_path, write_text
from megatron_r1reward.types import Label, Preference

log = logging.getLogger(__name__)

Order = Literal["auto", "drawn", "stored"]


def preference_row(preference: Preference) -> dict[str, Any]:
    """The R1-Reward-RL row of a preference, with its parts as explicit columns and absolute image paths."""
    messages = preference_messages(preference.question, preference.responses, len(preference.image_paths))
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
        "answer": [f"<answer>{preference.label}</answer>"],
        "images": list(preference.image_paths),
        **preference.metadata,
    }


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """What an import wrote; the rows themselves are read from `path` when they are asked for."""

    path: Path
    rows: int
    quarantined: int
    quarantine_path: Path | None  # None when every row was usable

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
    remove_duplicates: bool = False,
    remove_overlap_with: Sequence[str] = (),
) -> ImportResult:
    """Write `preferences.jsonl`, `media/` (images that were embedded), `quarantine.jsonl` and `import.json` into `out`.

    Streamed: of a row that was read only hashes stay in memory. A killed import goes on with what it has read.

    Args:
        source: what `iterate_rows` takes, or the id of a data set on the Hub.
        schema: one of `SCHEMAS`; "auto" looks at the first readable row.
        split: of a data set on the Hub.
        order: "drawn" draws which response stands first, with as many labels 1 as 2; "stored" keeps the source's order;
            "auto" draws where the source names its responses by their quality or has one label only.
        processes: that convert, check and decode.
        remove_duplicates: set aside pairs that occur again, the responses in any order, see `near_duplicates`.
        remove_overlap_with: benchmarks, or other sources; rows with a question of theirs about the same pictures are
            set aside.

    Raises:
        ValueError: `source` cannot be read, is of no known schema, or holds no usable row.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = Path(source)

    def rows() -> Iterator[RawRow]:
        return hub_rows(str(source), split) if is_hub_id(str(source)) else iterate_rows(path)

    chosen = _schema_of(rows(), schema, source)
    root = image_root or (Path.cwd() if is_hub_id(str(source)) else fixed_folder(path))
    reading = Reading(
        schema=chosen.name,
        from_one=chosen.name == "pairwise" and counts_from_zero(row.fields for row in rows()),
        roots=(root, *image_roots),
        media_dir=out / "media",
    )
    merge = _Merge(ids_repeat=reading.convert is not None, remove_duplicates=remove_duplicates)
    merge.overlap.update({other: _asked_in(other) for other in remove_overlap_with})
    parts, quarantine = out / ".parts", out / "quarantine.jsonl"
    parts.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parts) as scratch:
        merged = Path(scratch) / "merged.jsonl"
        merge.run(read_parts(rows(), parts, reading, processes=processes), merged, quarantine)
        merge.check(path, quarantine)
        draw = order == "drawn" or (order == "auto" and (chosen.better_first or len(merge.labels) == 1))
        wanted = np.random.default_rng(seed).permutation(merge.rows) % 2 + 1 if draw else None
        written = _write_rows(merged, out / "preferences.jsonl", wanted)
    if not draw:
        check_labels(path, merge.labels, text_only=merge.text_only)
    account = {
        "source": str(source),
        "schema": chosen.name,
        "order": f"drawn, seed {seed}" if draw else "as stored",
        "rows": merge.rows,
        **written,
        "text_only": merge.text_only,
        "quarantined": merge.refused,
        "duplicates": merge.duplicates,
        "overlap": merge.overlapping,
    }
    write_text(out / "import.json", json.dumps(account, indent=2) + "\n")
    shutil.rmtree(parts)
    return ImportResult(
        path=out / "preferences.jsonl",
        rows=merge.rows,
        quarantined=merge.refused,
        quarantine_path=quarantine if merge.refused else None,
    )


class _Merge:
    """The rows of all parts in turn: ids made distinct, repeats and overlap found, refused rows set aside."""

    def __init__(self, *, ids_repeat: bool, remove_duplicates: bool) -> None:
        self.ids_repeat, self.remove_duplicates = ids_repeat, remove_duplicates
        self.overlap: dict[str, Seen] = {}  # source -> what it asks about which pictures
        self.rows = self.refused = self.zero_labels = self.text_only = self.duplicates = 0
        self.first_reason = ""
        self.labels: Counter[Label] = Counter()
        self.overlapping: Counter[str] = Counter()
        self._ids: dict[str, tuple[int, bytes]] = {}  # id -> line, hash of all that the row says
        self._pairs = Seen()

    def run(self, rows: Iterable[PartRow], merged: Path, quarantine: Path) -> None:
        """Write what can be used to `merged`, and the rest to `quarantine`."""
        with (
            merged.open("w", encoding="utf-8") as sink,
            atomic_path(quarantine) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace") as aside,
        ):
            for row in rows:
                self._add(row, sink, aside)
        if not self.refused:
            quarantine.unlink()

    def _add(self, row: PartRow, sink: IO[str], aside: IO[str]) -> None:
        preference, reason = row.preference, row.reason
        self.zero_labels += row.zero_label
        if preference is not None:
            try:
                preference = self._wanted(row, preference)
            except RowError as error:
                preference, reason = None, str(error)
        if preference is None:
            self.refused += 1
            self.first_reason = self.first_reason or reason
            origin = row.origin
            line = {"source": origin.source, "line": origin.line, "reason": reason, "row": origin.excerpt}
            aside.write(json.dumps(line, ensure_ascii=False) + "\n")
            return
        self.rows += 1
        self.labels[preference.label] += 1
        self.text_only += not preference.image_paths
        sink.write(json.dumps(vars(preference), ensure_ascii=False) + "\n")

    def check(self, source: Path, quarantine: Path) -> None:
        """ValueError where the labels count from 0, or no row is left."""
        check_zero_labels(source, self.zero_labels, self.labels[2] > 0)
        if not self.rows:
            reason = f"the first of {self.refused} reasons: {self.first_reason}" if self.refused else "it is empty"
            raise ValueError(f"{source}: no usable row ({reason})")
        if self.refused:
            log.warning("%s: %d rows are set aside, see %s", source, self.refused, quarantine)

    def _wanted(self, row: PartRow, preference: Preference) -> Preference:
        """A sound row under an id of its own; repeats and overlap are counted.

        Raises:
            RowError: why it is not wanted.
        """
        for name, asked in self.overlap.items():
            if asked.holds(row.question, row.pictures):
                self.overlapping[name] += 1
                raise RowError(f"the same question about images that look the same is in {name}")
        named = self._named(row, preference)
        if self._pairs.holds(row.pair, row.pictures):
            self.duplicates += 1
            if self.remove_duplicates:
                raise RowError("question, images and responses, in some order, are those of an earlier row")
        else:
            self._pairs.add(row.pair, row.pictures)
        return named

    def _named(self, row: PartRow, preference: Preference) -> Preference:
        """`preference` under an id of its own, where its schema may repeat ids and it says something else.

        Raises:
            RowError: it repeats a row, or an id that must be its own.
        """
        number, name = 1, preference.id
        content = json.dumps(vars(replace(preference, id="")), sort_keys=True, ensure_ascii=True)
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        while name in self._ids:
            line, other = self._ids[name]
            if not self.ids_repeat:
                raise RowError(f"duplicate id {preference.id!r}, first used in line {line}")
            if other == digest:
                raise RowError(f"the same as line {line}, id {name!r}")
            number += 1
            name = f"{preference.id}#{number}"
        self._ids[name] = (row.origin.line, digest)
        return replace(preference, id=name)


def _write_rows(merged: Path, path: Path, wanted: np.ndarray | None) -> dict[str, Any]:
    """Our rows, with the label `wanted` for each; their labels, and how many changed places for that."""
    labels, exchanged = {"1": 0, "2": 0}, 0
    with merged.open(encoding="utf-8") as lines, atomic_path(path) as temporary, temporary.open("w") as sink:
        for place, line in enumerate(lines):
            row = preference_of(json.loads(line))
            change = wanted is not None and row.label != int(wanted[place])
            if change:
                row = replace(row, responses=row.responses[::-1], label=2 if row.label == 1 else 1)
            labels[str(row.label)] += 1
            exchanged += change
            sink.write(json.dumps({**preference_row(row), "exchanged": change}, ensure_ascii=False) + "\n")
    return {"labels": labels, "exchanged": exchanged}


def _preference_of(row: Mapping[str, Any]) -> Preference:
    """The preference of a row that `preference_row` made."""
    return Preference(
        id=row["id"],
        question=row["question"],
        responses=(row["response_1"], row["response_2"]),
        label=label_of(row["answer"]),
        image_paths=tuple(row["images"]),
        metadata={key: row[key] for key in ("category", "source") if key in row},
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


def _schema_of(rows: Iterator[RawRow], name: str, source: str | Path) -> Schema:
    if name != "auto" and name not in SCHEMAS:
        raise ValueError(f"--schema {name!r}: give auto or one of {', '.join(SCHEMAS)}")
    fields = next((row.fields for row in rows if row.fields is not None), None)
    if fields is None:
        raise ValueError(f"{source}: no readable row")
    if name == "auto":
        try:
            return detect(fields)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    missing = SCHEMAS[name].missing({column for column, value in fields.items() if value is not None})
    if missing:
        columns = sorted(fields)
        raise ValueError(
            f"{source}: schema {name} needs {', '.join(missing)}, the first row has {columns}: {nearest(columns)}"
        )
    return SCHEMAS[name]
