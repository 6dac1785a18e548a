"""Right answers by prompt text, as the released training code looks them up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1reward.data.rows import RowError, iterate_rows, label_of
from megatron_r1reward.types import Label


class UnknownMessageError(ValueError):
    """The prompt is not in the data set, or it is there with two different answers."""


class LabelTable:
    """Label of every `message` of a data set in the released schema (`message`, `answer`).

    The released server falls back to the most similar text when a message is unknown, and lets the last of several
    equal messages win; here the first is an error, and so are equal messages with different answers.

    Raises:
        ValueError: no row of the file has a message and an answer of 1 or 2.
    """

    def __init__(self, path: Path) -> None:
        self.skipped = 0  # rows without a usable message and answer
        self._labels: dict[str, Label] = {}
        self.ambiguous: set[str] = set()  # in the spelling of `_key`
        for row in iterate_rows(path):
            fields = row.fields or {}
            message = fields.get("message")
            try:
                label = label_of(fields.get("answer"))
            except RowError:
                self.skipped += 1
                continue
            if not isinstance(message, str | list):
                self.skipped += 1
            elif self._labels.setdefault(_key(message), label) != label:
                self.ambiguous.add(_key(message))
        if not self._labels:
            raise ValueError(
                f"{path}: no row has a `message` and an `answer` that is 1 or 2: give the file that the training "
                "reads, in the schema of R1-Reward-RL"
            )

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, message: str) -> Label:
        """Raises UnknownMessageError where the data set has no single answer."""
        key = _key(message)
        if key in self.ambiguous:
            raise UnknownMessageError(f"the data set has two different answers to {message[:200]!r}")
        try:
            return self._labels[key]
        except KeyError:
            raise UnknownMessageError(f"no row of the data set has the message {message[:200]!r}") from None


def _key(message: Any) -> str:
    """A message in one spelling, whether the data hold it as lists or as JSON text, whatever its white space."""
    if isinstance(message, str):
        try:
            message = json.loads(message)
        except (ValueError, RecursionError):
            return str(message)  # not a chat: any text may be a key
    return json.dumps(message, sort_keys=True)
