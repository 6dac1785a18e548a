"""The one reader for preference data and for supervised examples.

Rows follow R1-Reward-RL: `message` (a chat as JSON), `question`, `answer`, `image`. The explicit columns `id`,
`response_1`, `response_2`, `images`, `category` and `source` win where they are present. A row that cannot be used goes
to a quarantine file with its reason; it is never fatal and never dropped in silence.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_r1reward.data.chat import Chat, parse_chat
from megatron_r1reward.data.image_files import MediaResolver, examine_images
from megatron_r1reward.data.prompt import split_message_text
from megatron_r1reward.data.rows import Quarantine, RawRow, RowError, RowOrigin, iterate_rows
from megatron_r1reward.types import Label, Preference

logger = logging.getLogger(__name__)

_LABEL = re.compile(r"\s*(?:<answer>\s*([12])\s*</answer>|([12]))\s*")
# `<|im_end|>` in a text would end the turn it stands in.
_CONTROL_TOKEN = re.compile(r"<\|[A-Za-z_]+\|>")


@dataclass(frozen=True, kw_only=True)
class SftExample:
    """A chat that ends with a user turn, and the assistant text to learn.

    `messages` have content lists whose image entries are `{"type": "image"}`; the n-th one shows `image_paths[n]`.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    image_paths: tuple[str, ...]  # absolute
    response: str


@dataclass(frozen=True, kw_only=True)
class ReadResult:
    """What a file held. `quarantine_path` is None when every row was usable."""

    preferences: tuple[Preference, ...]
    quarantined: int
    quarantine_path: Path | None


@dataclass(frozen=True, kw_only=True)
class SftReadResult:
    """As `ReadResult`, for supervised examples."""

    examples: tuple[SftExample, ...]
    quarantined: int
    quarantine_path: Path | None


def read_preferences(
    path: Path,
    *,
    image_root: Path | None = None,
    media_dir: Path | None = None,
    quarantine: Path | None = None,
    verify_images: bool = True,
) -> ReadResult:
    """Read preferences from a JSONL file, Parquet file(s) or a saved `datasets` folder.

    Args:
        image_root: folder that relative image paths refer to and that no path may leave; default: the file's folder.
        media_dir: folder that embedded images are written to, once each, named by content.
        quarantine: JSONL file for unusable rows; default: `<path>.quarantine.jsonl`.
        verify_images: decode every image once; otherwise only its presence is checked.

    Raises:
        ValueError: the file is missing, damaged, of an unknown kind, or without one usable row.
    """
    rows, rejected = _read(path, _preference, image_root, media_dir, quarantine, verify_images)
    return ReadResult(
        preferences=rows, quarantined=len(rejected), quarantine_path=rejected.path if len(rejected) else None
    )


def read_sft_examples(
    path: Path,
    *,
    image_root: Path | None = None,
    media_dir: Path | None = None,
    quarantine: Path | None = None,
    verify_images: bool = True,
) -> SftReadResult:
    """Read rows with `message` (any chat, with or without images) and `response`; else as `read_preferences`."""
    rows, rejected = _read(path, _sft_example, image_root, media_dir, quarantine, verify_images)
    return SftReadResult(
        examples=rows, quarantined=len(rejected), quarantine_path=rejected.path if len(rejected) else None
    )


ExampleT = TypeVar("ExampleT", Preference, SftExample)
_Parser = Callable[[str, Mapping[str, Any], MediaResolver], ExampleT]


def _read(
    path: Path,
    parse: _Parser[ExampleT],
    image_root: Path | None,
    media_dir: Path | None,
    quarantine: Path | None,
    verify_images: bool,
) -> tuple[tuple[ExampleT, ...], Quarantine]:
    media = MediaResolver(image_root or (path if path.is_dir() else path.parent), media_dir)
    rejected = Quarantine(quarantine or path.with_name(f"{path.name}.quarantine.jsonl"))
    accepted: dict[str, tuple[RowOrigin, ExampleT]] = {}
    for row in iterate_rows(path):
        try:
            example = _parse_row(row, parse, media)
            if example.id in accepted:
                raise RowError(f"duplicate id {example.id!r}, first used in line {accepted[example.id][0].line}")
        except RowError as error:
            rejected.add(row.origin, str(error))
        else:
            accepted[example.id] = (row.origin, example)
    usable = _with_sound_images(accepted, rejected, media_dir) if verify_images else accepted
    rejected.write()
    if not usable:
        reason = f"the first of {len(rejected)} reasons: {rejected.first_reason}" if len(rejected) else "it is empty"
        raise ValueError(f"{path}: no usable row ({reason})")
    if len(rejected):
        logger.warning("%s: %d rows are unusable, see %s", path, len(rejected), rejected.path)
    return tuple(example for _, example in usable.values()), rejected


def _parse_row(row: RawRow, parse: _Parser[ExampleT], media: MediaResolver) -> ExampleT:
    if row.fields is None:
        raise RowError(row.error)
    identifier = row.fields.get("id")
    if identifier is None:
        identifier = f"{Path(row.origin.source).with_suffix('')}-{row.origin.line}"
    elif not isinstance(identifier, str | int) or identifier == "":
        raise RowError(f"id {identifier!r} is neither text nor number")
    return parse(str(identifier), row.fields, media)


def _with_sound_images(
    accepted: dict[str, tuple[RowOrigin, ExampleT]], rejected: Quarantine, media_dir: Path | None
) -> dict[str, tuple[RowOrigin, ExampleT]]:
    examined = examine_images((path for _, row in accepted.values() for path in row.image_paths), media_dir)
    sound = {}
    for identifier, (origin, example) in accepted.items():
        images = [examined[path] for path in example.image_paths]
        problem = next((image.problem for image in images if image.problem), "")
        if problem:
            rejected.add(origin, problem)
        else:
            sound[identifier] = (origin, replace(example, image_paths=tuple(image.path for image in images)))
    return sound


def _preference(identifier: str, fields: Mapping[str, Any], media: MediaResolver) -> Preference:
    chat = parse_chat(fields["message"]) if fields.get("message") is not None else None
    question, responses = _question_and_responses(fields, chat)
    image_paths = _image_paths(fields, chat, media)
    if not image_paths:
        raise RowError("no image")
    return Preference(
        id=identifier,
        question=question,
        responses=responses,
        label=_label(fields.get("answer")),
        image_paths=image_paths,
        metadata={key: str(fields[key]) for key in ("category", "source") if fields.get(key) is not None},
    )


def _sft_example(identifier: str, fields: Mapping[str, Any], media: MediaResolver) -> SftExample:
    chat = parse_chat(fields.get("message"))
    if chat.messages[-1]["role"] != "user":
        raise RowError(f"message ends with a turn of the {chat.messages[-1]['role']}, not of the user")
    for turn in chat.messages:
        for part in turn["content"]:
            _check_encodable("message", part.get("text", ""))
    image_paths = _image_paths(fields, chat, media)
    if len(image_paths) != len(chat.images):
        raise RowError(f"message shows {len(chat.images)} images, the row has {len(image_paths)}")
    return SftExample(
        id=identifier,
        messages=chat.messages,
        image_paths=image_paths,
        response=_required_text("response", fields.get("response")),
    )


def _question_and_responses(fields: Mapping[str, Any], chat: Chat | None) -> tuple[str, tuple[str, str]]:
    question, first, second = (fields.get(key) for key in ("question", "response_1", "response_2"))
    if first is None or second is None:
        if chat is None:
            raise RowError("neither message nor response_1 and response_2")
        try:
            shown, first, second = split_message_text(chat.user_text)
        except ValueError as error:
            raise RowError(str(error)) from error
        question = shown if question is None else question
    return (
        _required_text("question", question),
        (_required_text("response 1", first), _required_text("response 2", second)),
    )


def _image_paths(fields: Mapping[str, Any], chat: Chat | None, media: MediaResolver) -> tuple[str, ...]:
    """Paths from `images`, else `image`, else the chat's own image entries."""
    shown = chat.images if chat is not None else ()
    value = next((fields[key] for key in ("images", "image") if fields.get(key) is not None), None)
    paths = media.resolve(list(shown) if value is None else value)
    if shown and len(shown) != len(paths):
        raise RowError(f"message shows {len(shown)} images, the row has {len(paths)}")
    return paths


def _label(answer: Any) -> Label:
    """1 or 2 from e.g. ["<answer>2</answer>"], "2" or 2."""
    value = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    if value is None:
        raise RowError("answer is missing")
    match = _LABEL.fullmatch(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if match is None:
        raise RowError(f"answer {str(answer)[:100]!r} is neither 1 nor 2")
    return 1 if "1" in match.groups() else 2


def _required_text(name: str, value: Any) -> str:
    if value is None:
        raise RowError(f"{name} is missing")
    if not isinstance(value, str):
        raise RowError(f"{name} is {type(value).__name__}, not text")
    if not value.strip():
        raise RowError(f"{name} is empty")
    _check_encodable(name, value)
    return value


def _check_encodable(name: str, text: str) -> None:
    """Refuse what a tokenizer would read as something other than text, or not read at all."""
    token = _CONTROL_TOKEN.search(text)
    if token is not None:
        raise RowError(f"{name} holds the control token {token[0]}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name} holds an unpaired surrogate at character {error.start}") from error
