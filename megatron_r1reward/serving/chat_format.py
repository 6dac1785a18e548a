"""Prompts and sequences as other trainers decode them, with the chat format's own tokens, as plain texts.

A trainer's prompt is its chat template around a question; its sequence is that prompt and a response that ends with a
token of the format. Both are given as what they say: a judge must not see the format, and tokens inside a response are
what `wire` refuses. ChatML (Qwen) and Llama 3's format are known; a text without them stays as it is.
"""

from __future__ import annotations

import re
from typing import Any

_HEADER = re.compile(r"<\|im_start\|>(\w+)\n|<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*")
_IMAGES = re.compile(r"<\|vision_start\|>(?:<\|(?:image|video)_pad\|>)*<\|vision_end\|>|<\|image\|>")
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>")
_BEGINS = ("<|begin_of_text|>", "<|endoftext|>", "<|im_end|>")  # also padding on the left


def question_of(prompt: str | list[dict[str, Any]]) -> str:
    """What a prompt asks: the turns of a conversation but for the system's, one after the other."""
    if not isinstance(prompt, str):
        return "\n".join(content_text(turn.get("content")) for turn in prompt if turn.get("role") != "system")
    prompt = _without_begins(prompt)
    headers = list(_HEADER.finditer(prompt))
    if not headers:
        return _IMAGES.sub("", prompt)
    turns = [
        (header[1] or header[2], without_ends(prompt[header.end() : following]))
        for header, following in zip(headers, [*(h.start() for h in headers[1:]), len(prompt)], strict=True)
    ]
    return "\n".join(_IMAGES.sub("", text) for role, text in turns if role != "system" and text)


def response_in(query: str, prompt: str) -> str:
    """What follows the prompt in a whole sequence, without the tokens that end it.

    Raises:
        ValueError: the sequence does not hold its prompt.
    """
    query, prompt = _without_begins(query), _without_begins(prompt)
    if query.startswith(prompt):
        return without_ends(query[len(prompt) :])
    # Images were expanded between the two, or a tokenizer changed white space: as many headers as the prompt has.
    count = len(_HEADER.findall(prompt))
    headers = list(_HEADER.finditer(query))
    if not count or len(headers) < count:
        raise ValueError("a query does not begin with its prompt: send both as the trainer's tokenizer decodes them")
    return without_ends(query[headers[count - 1].end() :])


def content_text(content: Any) -> str:
    """The text of a message's content: text itself, or parts of which some are text."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or [] if isinstance(part, dict))


def without_ends(text: str) -> str:
    """A turn without the tokens that end it."""
    text = text.strip()
    while ended := next((token for token in _ENDS if text.endswith(token)), None):
        text = text.removesuffix(ended).rstrip()
    return text


def _without_begins(text: str) -> str:
    while begun := next((token for token in _BEGINS if text.startswith(token)), None):
        text = text.removeprefix(begun)
    return text
