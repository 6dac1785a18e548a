"""Bring any supported preference file into one folder: checked rows, embedded images as files, bad rows set aside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_r1reward.data.preference import ReadResult, read_preferences
from megatron_r1reward.data.prompt import preference_messages
from megatron_r1reward.files import write_jsonl
from megatron_r1reward.types import Preference


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


def keep_selected(preferences: Sequence[Preference], selection: Path | None) -> tuple[Preference, ...]:
    """The preferences whose ids are in the JSON list at `selection`; all of them when there is none.

    Raises:
        ValueError: the file is not a JSON list of ids, or an id is not among the preferences.
    """
    if selection is None:
        return tuple(preferences)
    try:
        ids = json.loads(selection.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"data.select {selection} is not readable as a JSON list of ids: {error}") from error
    if not isinstance(ids, list):
        raise ValueError(f"data.select {selection} holds a {type(ids).__name__}, not a list of ids")
    wanted = set(ids)
    missing = wanted - {preference.id for preference in preferences}
    if missing:
        raise ValueError(f"data.select {selection}: {len(missing)} ids are not in data.train, e.g. {min(missing)!r}")
    return tuple(preference for preference in preferences if preference.id in wanted)
