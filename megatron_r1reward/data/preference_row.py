"""A row of ours, in the columns of R1-Reward-RL and the explicit ones, as a preference or a supervised example.

Images inside responses: `images` has all of a row, in the order of the prompt (question, response 1, response 2), and
`response_images` how many of them are in each response, which shows them where its text has `<image>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_r1reward.data.chat import IMAGE_PLACEHOLDER, Chat, parse_chat, show_placeholders
from megatron_r1reward.data.image_files import MediaResolver
from megatron_r1reward.data.prompt import RATINGS, preference_messages, rating_text, split_message_text
from megatron_r1reward.data.rows import RawRow, RowError, label_of, label_or_none
from megatron_r1reward.data.video_frames import frames_of
from megatron_r1reward.types import Label, Preference

_PLACEHOLDER = re.compile(rf"\s*{IMAGE_PLACEHOLDER}\n?")
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
    metadata: Mapping[str, str] = field(default_factory=dict)  # as of a `Preference`
    label: Label | None = None  # of a row about two responses whose `answer` says which is better
    difficulty: int | None = None  # attempts that the annotator needed, where the row says so


def row_identifier(row: RawRow, fields: Mapping[str, Any]) -> str:
    identifier = fields.get("id")
    if identifier is None:
        identifier = f"{Path(row.origin.source).with_suffix('')}-{row.origin.line}"
    elif isinstance(identifier, float) and identifier.is_integer():  # what a Parquet writer makes of a column with gaps
        identifier = int(identifier)
    elif not isinstance(identifier, str | int) or isinstance(identifier, bool) or identifier == "":
        raise RowError(f"id {identifier!r} is neither text nor number")
    _check_utf8("id", str(identifier))
    return str(identifier)


def parse_preference(
    identifier: str, fields: Mapping[str, Any], media: MediaResolver, ties: bool = False
) -> Preference:
    """A row in our columns as a preference, its images not yet opened. Raises RowError where it is none."""
    chat = parse_chat(fields["message"]) if fields.get("message") is not None else None
    question, responses = _question_and_responses(fields, chat)
    image_paths = _image_paths(fields, chat, media)
    response_images = _response_images(fields.get("response_images"), responses, len(image_paths))
    question = _without_placeholders(question, len(image_paths) - sum(response_images))
    return Preference(
        id=identifier,
        question=question,
        responses=responses,
        label=(label_or_none if ties else label_of)(fields.get("answer")),
        image_paths=image_paths,
        metadata=_metadata(fields),
        response_images=response_images,
    )


def parse_sft_example(
    identifier: str, fields: Mapping[str, Any], media: MediaResolver, rated: str | None = None
) -> SftExample:
    """A row in our columns as a supervised example: `message` and `response`, or of a pointwise model `question`,
    `candidate`, `rating` and `reasoning`. Raises RowError where it is none.

    Args:
        rated: the template of the pointwise model that is trained; None: it is none.
    """
    rates = fields.get("rating") is not None and fields.get("candidate") is not None
    if rates and rated is None:
        raise RowError("it has a rating, which a pointwise model learns: set prompt.kind = 'pointwise'")
    if rates and rated is not None and fields.get("message") is None:
        return _rated_example(identifier, fields, media, rated)
    chat = parse_chat(fields.get("message"))
    if chat.messages[-1]["role"] != "user":
        raise RowError(f"message ends with a turn of the {chat.messages[-1]['role']}, not of the user")
    for turn in chat.messages:
        for part in turn["content"]:
            _check_encodable("message", part.get("text", ""))
    image_paths = _image_paths(fields, chat, media)
    messages = chat.messages if chat.images else show_placeholders(chat.messages, len(image_paths))
    return SftExample(
        id=identifier,
        messages=messages,
        image_paths=image_paths,
        response=_required_text("response", fields.get("response")),
        metadata=_metadata(fields),
        label=_label_if_any(fields.get("answer")),
        difficulty=_difficulty(fields.get("difficulty")),
    )


def _rated_example(identifier: str, fields: Mapping[str, Any], media: MediaResolver, template: str) -> SftExample:
    """The prompt about `candidate`, and the reasoning and the rating that answer it."""
    rating = fields["rating"]
    if isinstance(rating, float) and rating.is_integer():  # what a Parquet writer makes of a column with gaps
        rating = int(rating)
    if not isinstance(rating, int) or isinstance(rating, bool) or rating not in RATINGS:
        raise RowError(f"rating is {str(rating)[:40]}, not a whole number from {RATINGS[0]} to {RATINGS[-1]}")
    image_paths = _image_paths(fields, None, media)
    candidate = _required_text("candidate", fields["candidate"])
    question = _without_placeholders(_required_text("question", fields.get("question")), len(image_paths))
    reasoning = _required_text("reasoning", fields.get("reasoning")).strip()
    return SftExample(
        id=identifier,
        messages=tuple(preference_messages(question, (candidate, ""), len(image_paths), template=template)),
        image_paths=image_paths,
        response=rating_text(reasoning, rating),
        metadata=_metadata(fields),
    )


def _metadata(fields: Mapping[str, Any]) -> dict[str, str]:
    found = {key: str(fields[key]) for key in ("category", "source") if fields.get(key) is not None}
    for key, value in found.items():
        _check_utf8(key, value)
    return found


def _label_if_any(answer: Any) -> Label | None:
    """The answer of a chat about anything may be anything."""
    try:
        return label_or_none(answer)
    except RowError:
        return None


def _difficulty(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():  # what a Parquet writer makes of a column with gaps
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 1 else None


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
    """Paths from `images`, else `image`, else the chat's own image entries, else frames of `video` or `videos`."""
    shown = chat.images if chat is not None else ()
    value = next((fields[key] for key in ("images", "image") if fields.get(key) not in (None, [])), None)
    value = frames_of(fields) if value is None and not shown else value
    paths = media.resolve(list(shown) if value is None else value)
    if shown and len(shown) != len(paths):
        raise RowError(f"message shows {len(shown)} images, the row has {len(paths)}")
    for path in paths:  # a file name may be any bytes
        _check_utf8("image path", path)
    return paths


def _response_images(value: Any, responses: tuple[str, str], images: int) -> tuple[int, int]:
    """How many of a row's images stand in each response; none unless the row says so."""
    if value in (None, []):
        return (0, 0)
    if not isinstance(value, list) or len(value) != 2 or not all(type(one) is int and one >= 0 for one in value):
        raise RowError(f"response_images is {str(value)[:100]!r}, not how many images response 1 and response 2 show")
    for number, text, count in zip((1, 2), responses, value, strict=True):
        shown = text.count(IMAGE_PLACEHOLDER)
        if count and shown != count:
            raise RowError(f"response {number} shows {shown} {IMAGE_PLACEHOLDER}, response_images says {count}")
    if sum(value) > images:
        raise RowError(f"the responses show {sum(value)} images, the row has {images}")
    return (value[0], value[1])


def _without_placeholders(question: str, images: int) -> str:
    """The question without `<image>`, which other programs write where an image stands; here images come first."""
    shown = len(_PLACEHOLDER.findall(question))
    if shown == 0:
        return question
    if shown != images:
        raise RowError(f"question shows {shown} {IMAGE_PLACEHOLDER} placeholders, the row has {images} images")
    return _required_text("question", _PLACEHOLDER.sub("", question).strip())


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
    _check_utf8(name, text)


def _check_utf8(name: str, text: str) -> None:
    """Refuse what no JSON file of ours, no request and no tokenizer can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name} holds an unpaired surrogate at character {error.start}") from error
