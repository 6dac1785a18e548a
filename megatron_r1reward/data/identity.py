"""What a row or a model is: what it says, not its name, nor its place in a file.

    question   the chat that a model is shown and the bytes of its images      attempts are kept by it
    row        the question and its answer (label, or the text to learn)       selections, curricula, resumed runs

A model at an endpoint is known by its name only. A folder of ours is known by a sample of its weights, because the name
says nothing about them: stages write new weights into the same folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_r1reward.data.preference_row import SftExample
from megatron_r1reward.data.prompt import messages_of
from megatron_r1reward.model_folder import prompt_policy
from megatron_r1reward.types import Preference

_BLOCK = 1 << 20
_SAMPLES = 64  # blocks of a weight file; training changes every one of them
_SAMPLE = 64 << 10
_WEIGHTS = (".safetensors", ".bin")
_DESCRIPTIONS = ("*.json", "*.jinja", "*.txt", "*.model")  # configuration, tokenizer, processor, chat template


class ContentKeys:
    """Keys of rows by content, 32 hexadecimal digits; every image file is read once."""

    def __init__(self) -> None:
        self._images: dict[str, str] = {}

    def question(self, example: Preference | SftExample) -> str:
        """What a model is asked about a preference in its stored order, or by a chat. The label is not part of it."""
        messages = example.messages if isinstance(example, SftExample) else messages_of(example)
        return digest_of([messages, self._seen(example.image_paths)])

    def pair(self, example: Preference | SftExample) -> str:
        """The question, and which response is better: the same of a preference and of the chat that asks about it."""
        return digest_of([self.question(example), example.label])

    def row(self, example: Preference | SftExample) -> str:
        """Everything about a row that training or judging depends on."""
        if isinstance(example, SftExample):
            return digest_of([example.messages, self._seen(example.image_paths), example.response])
        return self.pair(example)

    def images(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Of the files, in their order."""
        return tuple(self._seen(list(paths)))

    def _seen(self, paths: Iterable[str]) -> list[str]:
        for path in paths:
            if path not in self._images:
                self._images[path] = _file_digest(Path(path))
        return [self._images[path] for path in paths]


def model_identity(folder: Path, *, weights: bool = True) -> str:
    """Of a Hugging Face folder: its small files in full, and blocks spread over each file of weights. Without `weights`
    only what text and images become, and what the weights would mean: configuration, tokenizer, processor, template.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the Hugging Face folder of a model")
    digest = xxhash.xxh3_128()
    patterns = (*_DESCRIPTIONS, *(f"*{suffix}" for suffix in (_WEIGHTS if weights else ())))
    named = {path for pattern in patterns for path in folder.glob(pattern)}
    named.discard(folder / prompt_policy.FILE)  # says how the model is asked, not what it computes
    if not weights:
        named = {path for path in named if not path.name.endswith(".index.json")}
    for path in sorted(named):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            if path.suffix not in _WEIGHTS or size <= _SAMPLES * _SAMPLE:
                while block := file.read(_BLOCK):
                    digest.update(block)
                continue
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, for a message: "temperature: 1.0 then, 0.5 now; ..."; empty when nothing does."""
    keys = sorted(then.keys() | now.keys())
    return "; ".join(
        f"{key}: {then.get(key)} then, {now.get(key)} now" for key in keys if then.get(key) != now.get(key)
    )


def digest_of(content: Any) -> str:
    """32 hexadecimal digits of a JSON value."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _file_digest(path: Path) -> str:
    """A file that cannot be read has no content yet; whoever needs it says so."""
    digest = xxhash.xxh3_128()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()
