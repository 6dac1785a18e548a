"""Right answers by prompt text, as the released training code looks them up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megatron_r1reward.data.rows import iterate_rows
from megatron_r1reward.types import Label

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LABELS: Final[Mapping[str, Label]] = {"1": 1, "2": 2}


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
        self.ambiguous: set[str] = set()
        for row in iterate_rows(path):
            fields = row.fields or {}
            message, label = fields.get("message"), _label(fields.get("answer"))
            if not isinstance(message, str) or label is None:
                self.skipped += 1
            elif self._labels.setdefault(message, label) != label:
                self.ambiguous.add(message)
        if not self._labels:
            raise ValueError(
                f"{path}: no row has a text `message` and an `answer` that is 1 or 2: give the file that the training "
                "reads, in the schema of R1-Reward-RL"
            )

    def __len__(self) -> int:
        return len(self._labels)

    def label(self, message: str) -> Label:
        """Raises UnknownMessageError where the data set has no single answer."""
        if message in self.ambiguous:
            raise UnknownMessageError(f"the data set has two different answers to {message[:200]!r}")
        try:
            return self._labels[message]
        except KeyError:
            raise UnknownMessageError(f"no row of the data set has the message {message[:200]!r}") from None


def _label(answer: Any) -> Label | None:
    """The label in `["<answer>2</answer>"]`, its only element, or "2"."""
    if isinstance(answer, list):
        answer = answer[0] if len(answer) == 1 else None
    if not isinstance(answer, str):
        return None
    inner = _ANSWER.search(answer)
    return _LABELS.get((inner[1] if inner else answer).strip())
