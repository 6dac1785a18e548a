"""Bring any supported preference file into one folder: checked rows, embedded images as files, bad rows set aside."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from megatron_r1reward.data.identity import ContentKeys
from megatron_r1reward.data.preference import ReadResult, read_preferences
from megatron_r1reward.data.prompt import preference_messages
from megatron_r1reward.data.rows import RawRow, hub_rows, is_hub_id, iterate_rows
from megatron_r1reward.data.schemas import SCHEMAS, Schema, counts_from_zero, detect, nearest
from megatron_r1reward.files import write_jsonl, write_text
from megatron_r1reward.types import Preference

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
) -> ReadResult:
    """Write `preferences.jsonl`, `media/` (images that were embedded), `quarantine.jsonl` and `import.json` into `out`.

    Args:
        source: what `iterate_rows` takes, or the id of a data set on the Hub.
        schema: one of `SCHEMAS`; "auto" looks at the first readable row.
        split: of a data set on the Hub.
        order: "drawn" draws which response stands first, with as many labels 1 as 2; "stored" keeps the source's order;
            "auto" draws where the source names its responses by their quality or has one label only.

    Raises:
        ValueError: `source` cannot be read, is of no known schema, or holds no usable row.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = Path(source)

    def rows() -> Iterator[RawRow]:
        return hub_rows(str(source), split) if is_hub_id(str(source)) else iterate_rows(path)

    chosen = _schema_of(rows(), schema, source)
    convert = chosen.convert
    if chosen.name == "pairwise" and counts_from_zero(row.fields for row in rows()):
        convert = _from_one(chosen.convert)
    result = read_preferences(
        path,
        image_root=image_root or (Path.cwd() if is_hub_id(str(source)) else None),
        image_roots=image_roots,
        media_dir=out / "media",
        quarantine=out / "quarantine.jsonl",
        convert=None if chosen.name == "r1_reward" else convert,
        rows=rows(),
    )
    labels = Counter(preference.label for preference in result.preferences)
    draw = order == "drawn" or (order == "auto" and (chosen.better_first or len(labels) == 1))
    preferences, exchanged = _draw_order(result.preferences, seed) if draw else (result.preferences, frozenset[str]())
    write_jsonl(
        out / "preferences.jsonl",
        ({**preference_row(row), "exchanged": row.id in exchanged} for row in preferences),
    )
    account = {
        "source": str(source),
        "schema": chosen.name,
        "order": f"drawn, seed {seed}" if draw else "as stored",
        "rows": len(preferences),
        "labels": {str(label): sum(row.label == label for row in preferences) for label in (1, 2)},
        "exchanged": len(exchanged),
        "text_only": sum(not row.image_paths for row in preferences),
        "quarantined": result.quarantined,
    }
    write_text(out / "import.json", json.dumps(account, indent=2) + "\n")
    return replace(result, preferences=preferences)


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


def _from_one(convert: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Callable[..., Mapping[str, Any]]:
    """`convert`, with winners that count from 0 counted from 1."""

    def counted(fields: Mapping[str, Any]) -> Mapping[str, Any]:
        row = convert(fields)
        try:
            return {**row, "answer": int(float(row["answer"])) + 1}
        except (TypeError, ValueError):
            return row  # a name, or nothing: the reader says what is wrong

    return counted


def _draw_order(preferences: Sequence[Preference], seed: int) -> tuple[tuple[Preference, ...], frozenset[str]]:
    """The preferences, half of them with label 1, and the ids of those whose responses changed places for that."""
    wanted = np.random.default_rng(seed).permutation(len(preferences)) % 2 + 1
    exchanged = frozenset(row.id for row, label in zip(preferences, wanted, strict=True) if row.label != label)
    return tuple(
        replace(row, responses=row.responses[::-1], label=2 if row.label == 1 else 1) if row.id in exchanged else row
        for row in preferences
    ), exchanged


def selection(preferences: Iterable[Preference], ids: Collection[str]) -> list[dict[str, str]]:
    """What `data.select` reads: the ids of rows, and what they said when they were selected."""
    keys = ContentKeys()
    return [{"id": row.id, "content": keys.row(row)} for row in preferences if row.id in ids]


def keep_selected(
    preferences: Sequence[Preference], selection: Path | None, *, set_aside: Collection[str] = ()
) -> tuple[Preference, ...]:
    """The preferences that the JSON list at `selection` names; all of them when there is none.

    An entry is an id, or `{"id": ..., "content": ...}`. Of the latter rows are kept that say what they said when they
    were selected, also under another id. A warning counts those that do not, and those that the reader set aside.

    Raises:
        ValueError: the file is not such a list, an id is not in the data, or no row is left.
    """
    if selection is None:
        return tuple(preferences)
    try:
        entries = json.loads(selection.read_text())
        if not isinstance(entries, list):
            raise ValueError(f"it holds a {type(entries).__name__}")
        wanted = [_Selected.model_validate(entry if isinstance(entry, dict) else {"id": entry}) for entry in entries]
    except (OSError, ValueError) as error:
        raise ValueError(f"data.select {selection} is not readable as a JSON list of ids: {error}") from error
    ids = {row.id for row in preferences}
    content = {entry.content for entry in wanted if entry.content is not None}
    keys = ContentKeys()
    found = {row.id: keys.row(row) for row in preferences} if content else {}
    there = ids | set(found.values())
    missing = {entry.id for entry in wanted if entry.id not in ids and entry.content not in there}
    unknown = missing.difference(set_aside)
    if unknown:
        raise ValueError(f"data.select {selection}: {len(unknown)} ids are not in data.train, e.g. {min(unknown)!r}")
    by_id = {entry.id for entry in wanted if entry.content is None}
    changed = [entry.id for entry in wanted if entry.content is not None and entry.content not in there]
    changed = [identifier for identifier in changed if identifier not in missing]
    kept = tuple(row for row in preferences if row.id in by_id or found.get(row.id) in content)
    problems = []
    if changed:
        problems.append(
            f"{len(changed)} of {len(wanted)} rows have other texts, images or labels than when they were selected, "
            f"e.g. {min(changed)!r}: select again (`r1reward annotate`)"
        )
    if missing:
        problems.append(f"{len(missing)} of {len(wanted)} rows are in the quarantine file of data.train")
    if problems and not kept:
        raise ValueError(f"data.select {selection}: no row is left: {'; '.join(problems)}")
    if problems:
        log.warning("data.select %s: rows are left out: %s", selection, "; ".join(problems))
    return kept


class _Selected(BaseModel):
    model_config = ConfigDict(strict=True)

    id: str
    content: str | None = None
