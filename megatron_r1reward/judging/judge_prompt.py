"""Other people's judges: what they are asked with, and how their verdict is read.

    prompt = JudgePrompt.load(Path("llava_critic.txt"), verdict="answer-text")

A prompt file is a text with {question}, {response_1} and {response_2}, which is asked as one user turn, or (named
*.json) a list of chat messages {"role", "content"} whose contents are such texts. The question's images stand before
the text that has {question}, or where {images} says; those of a response in its text. Other braces are text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1reward.data.prompt import IMAGE_PLACEHOLDER, TEMPLATE, preference_messages
from megatron_r1reward.reward.readers import Reader, strict, verdict_reader

_FIELDS = ("question", "response_1", "response_2")
_PLACE = re.compile(r"\{(question|response_1|response_2|images)\}")


@dataclass(frozen=True, kw_only=True)
class JudgePrompt:
    """How a question is put, and how the answer is read. `turns`: (role, text); none: the reward model's own prompt,
    which is `template` with {question}, {answer1} and {answer2}."""

    turns: tuple[tuple[str, str], ...] = ()
    template: str = TEMPLATE
    read: Reader = strict

    @classmethod
    def load(cls, path: Path | None, *, verdict: str = "answer") -> JudgePrompt:
        """Read a prompt file; None is the reward model's own prompt.

        Raises:
            ValueError: the file cannot be read, is not of the form, or lacks a field; `verdict` is no reader.
        """
        read = verdict_reader(verdict)
        if path is None:
            return cls(read=read)
        try:
            text = path.read_text(encoding="utf-8")
            messages = json.loads(text) if path.suffix == ".json" else [{"role": "user", "content": text}]
            turns = tuple((str(message["role"]), message["content"]) for message in messages)
            if not all(isinstance(content, str) for _, content in turns):
                raise ValueError("a content is no text")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"prompt {path} is no text and no list of {{role, content}}: {error!r}") from error
        places = [place for _, content in turns for place in _PLACE.findall(content)]
        for field in _FIELDS:
            if field not in places:
                raise ValueError(f"prompt {path} has no {{{field}}}: put it where the text belongs")
        return cls(turns=turns, read=read)

    def messages(
        self,
        question: str,
        responses: tuple[str, str],
        images: Sequence[str],
        *,
        response_images: tuple[int, int] = (0, 0),
    ) -> list[dict[str, Any]]:
        """The chat to send, with every image's URL at its place.

        Args:
            response_images: how many of the images, the last ones, are in each response, where its text has `<image>`.
        """
        asked = len(images) - sum(response_images)
        if not self.turns:
            messages = preference_messages(
                question, responses, asked, template=self.template, response_images=response_images
            )
            return _with_images(messages, images)
        texts = {"question": question, "response_1": responses[0], "response_2": responses[1]}
        parts = [_image_part(url) for url in images]
        second = asked + response_images[0]
        shown = {"images": parts[:asked], "response_1": parts[asked:second], "response_2": parts[second:]}
        placed = any("{images}" in content for _, content in self.turns)
        return [
            {"role": role, "content": _contents(content, texts, shown, first="{question}" in content and not placed)}
            for role, content in self.turns
        ]


def _contents(
    template: str, texts: Mapping[str, str], images: Mapping[str, Sequence[dict[str, Any]]], *, first: bool
) -> str | list[dict[str, Any]]:
    """A turn's content: plain text where it shows no images, the one form that every endpoint takes."""
    pieces: list[str | dict[str, Any]] = [*images["images"]] if first else []
    left = [] if first else images["images"]  # shown once in a turn
    for number, piece in enumerate(_PLACE.split(template)):
        if number % 2 == 0:
            pieces.append(piece)
        elif piece == "images":
            pieces += left
            left = []
        else:
            pieces += _filled(texts[piece], images.get(piece, ()))
    content: list[dict[str, Any]] = []
    for part in pieces:
        if isinstance(part, dict):
            content.append(part)
        elif part and content and content[-1]["type"] == "text":
            content[-1]["text"] += part
        elif part:
            content.append({"type": "text", "text": part})
    if any(part["type"] != "text" for part in content):
        return content
    return "".join(part["text"] for part in content)


def _filled(text: str, images: Sequence[dict[str, Any]]) -> list[str | dict[str, Any]]:
    """A text with its images where it has `<image>`."""
    if not images:
        return [text]
    first, *others = text.split(IMAGE_PLACEHOLDER)
    return [first, *(piece for pair in zip(images, others, strict=True) for piece in pair)]


def _with_images(messages: list[dict[str, Any]], images: Sequence[str]) -> list[dict[str, Any]]:
    """The reward model's chat with every image placeholder filled in."""
    urls = iter(images)
    for message in messages:
        message["content"] = [
            _image_part(next(urls)) if part["type"] == "image" else part for part in message["content"]
        ]
    return messages


def _image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}
