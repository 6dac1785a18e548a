"""The files beside the weights that some command reads later: one that is torn is named before anything is loaded.

Conversions and `verify`, which copy them, and everything that trains or serves a folder ask `damaged_files`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_r1reward.files import LFS_POINTER
from megatron_r1reward.model_folder.prompt_policy import read_policy

CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
FIX = "copy it from the model that this one was made from"
_OBJECTS = (
    *(TOKENIZER, TOKENIZER_CONFIG, "vocab.json", "added_tokens.json", "special_tokens_map.json"),
    *(IMAGE_PROCESSOR, PROCESSOR, "video_preprocessor_config.json", CHAT_TEMPLATES[1], "generation_config.json"),
)
_TEXTS = ("merges.txt", CHAT_TEMPLATES[0])


def damaged_files(folder: Path) -> Iterator[str]:
    """One line per file that is there and cannot be read as what its name says. `config.json`, the index and the
    weights are `read_folder_weights`' matter."""
    found: list[str] = []
    for name in _OBJECTS:
        if (folder / name).is_file():
            _note(found, lambda name=name: read_object(folder / name))
    for name in _TEXTS:
        if (folder / name).is_file():
            _note(found, lambda name=name: _read_text(folder / name))
    if not found:  # else said already
        _note(found, lambda: check_template_syntax(folder))
    _note(found, lambda: read_policy(folder))
    yield from found


def check_files(folder: Path) -> None:
    """ValueError that names every file of `damaged_files`."""
    if problems := list(damaged_files(folder)):
        raise ValueError(f"{folder}: {'; '.join(problems)}")


def _note(found: list[str], read: Any) -> None:
    try:
        read()
    except ValueError as error:
        found.append(str(error))


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}): {FIX}") from error
    if text.startswith(LFS_POINTER.decode()):
        raise ValueError(f"{path.name} is a pointer of git-lfs, not the file itself: run git lfs pull in its folder")
    return text


def end_of_turn(folder: Path) -> str:
    """The token that ends a turn of the assistant, as the trainer puts it there: the tokenizer's `eos_token`.

    Raises:
        ValueError: tokenizer_config.json does not say it.
    """
    path = folder / TOKENIZER_CONFIG
    token = read_object(path).get("eos_token") if path.is_file() else None
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"{path} names no eos_token, with which a response ends: {FIX}")
    return text


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder; ValueError, which names the file alone, when it holds none."""
    text = _read_text(path)
    try:
        tree = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read ({error}): {FIX}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} is no JSON object: {FIX}")
    return tree


def chat_template(folder: Path) -> str | None:
    """The text of the folder's chat template, wherever versions of transformers have put it; None when there is none.

    Raises:
        ValueError: a file that may hold it is damaged.
    """
    if (folder / CHAT_TEMPLATES[0]).is_file():
        return _read_text(folder / CHAT_TEMPLATES[0]) or None
    for name in (TOKENIZER_CONFIG, CHAT_TEMPLATES[1]):
        found = read_object(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):  # named ones: the plain chat is called default
            found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
        if isinstance(found, str) and found:
            return found
    return None


def check_template_syntax(folder: Path) -> None:
    """ValueError where the folder's chat template is no template, e.g. for want of its end."""
    text = chat_template(folder)
    if text is None:
        return
    from jinja2 import Environment, TemplateSyntaxError
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    class Generation(Extension):
        """transformers' block around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  (as the base class has it)

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=[Generation, "jinja2.ext.loopcontrols"], autoescape=False).parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template cannot be read (line {error.lineno}: {error.message}): {FIX}") from error
