"""Bring any supported preference file into one folder: checked rows, embedded images as files, bad rows set aside."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from megatron_r1reward.data.identity import ContentKeys
from megatron_r1reward.data.preference import ReadResult, read_preferences
from megatron_r1reward.data.prompt import preference_messages
from megatron_r1reward.files import write_jsonl
from megatron_r1reward.types import Preference

log = logging.getLogger(__name__)


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


def import_preferences(source: Path, out: Path, *, image_root: Path | None = None) -> ReadResult:
    """Write `preferences.jsonl`, `media/` (images that were embedded) and `quarantine.jsonl` into `out`.

    Raises:
        ValueError: `source` cannot be read or holds no usable row.
    """
    out.mkdir(parents=True, exist_ok=True)
    result = read_preferences(
        source, image_root=image_root, media_dir=out / "media", quarantine=out / "quarantine.jsonl"
    )
    write_jsonl(out / "preferences.jsonl", [preference_row(preference) for preference in result.preferences])
    return result


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
