"""The `message` column: a chat as a JSON string or as lists, brought into one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_r1reward.data.prompt import IMAGE_PLACEHOLDER
from megatron_r1reward.data.rows import RowError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """`messages` hold content lists whose image entries are bare `{"type": "image"}`; `images` are what those entries
    referred to, in order, None where an entry named nothing."""

    messages: tuple[dict[str, Any], ...]
    images: tuple[Any, ...]

    @property
    def user_text(self) -> str:
        """The text of the last user turn."""
        turn = next((message for message in reversed(self.messages) if message["role"] == "user"), None)
        if turn is None:
            raise RowError("message has no user turn")
        return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


def parse_chat(value: Any) -> Chat:
    """Read a chat.

    Raises:
        RowError: not JSON, no turns, an unknown role, or a content part that is neither text nor image.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"message is malformed JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise RowError("message is not a list of chat turns")
    images: list[Any] = []
    messages = tuple(_parse_turn(turn, images) for turn in value)
    return Chat(messages=messages, images=tuple(images))


def _parse_turn(turn: Any, images: list[Any]) -> dict[str, Any]:
    """One turn with its content as a list; what its image entries refer to is appended to `images`."""
    role = turn.get("role") if isinstance(turn, Mapping) else None
    if role not in ROLES:
        raise RowError(f"message turn has role {role!r}, not one of {', '.join(ROLES)}")
    content = turn.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RowError(f"content of the {role} turn is {type(content).__name__}, not text or a list of parts")
    parts: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            images.append(part.get("image"))
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise RowError(f"content part of type {kind!r} is neither text nor image")
    return {"role": role, "content": parts}


def show_placeholders(messages: tuple[dict[str, Any], ...], images: int) -> tuple[dict[str, Any], ...]:
    """`messages`, whose parts are texts, with an image part in place of each `<image>`.

    Raises:
        RowError: another number of placeholders than of images.
    """
    texts = [part["text"] for turn in messages for part in turn["content"]]
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if placeholders != images:
        raise RowError(f"message shows {placeholders} images, the row has {images}")
    if placeholders == 0:
        return messages
    return tuple(
        {**turn, "content": [piece for part in turn["content"] for piece in _pieces(part)]} for turn in messages
    )


def _pieces(part: dict[str, str]) -> list[dict[str, str]]:
    first, *others = part["text"].split(IMAGE_PLACEHOLDER)
    pieces = [{"type": "text", "text": first}]
    for text in others:
        pieces += [{"type": "image"}, {"type": "text", "text": text.removeprefix("\n")}]
    return [piece for piece in pieces if piece.get("text") != ""]
