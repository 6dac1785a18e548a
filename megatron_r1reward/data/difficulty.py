"""How hard a preference is: the attempts an annotator model needed to judge it as humans did."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_r1reward.types import Label

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What one attempt said, and what it took."""

    text: str
    seed: int
    finish_reason: str = ""  # "stop", "length", ...; empty: the endpoint did not say
    prompt_tokens: int = 0  # as the endpoint counts them
    completion_tokens: int = 0
    cost: float = 0.0  # in the currency of the run file's prices


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """The attempts on one preference in order, True where the annotator chose as the label; it stops at a success.

    `content`, `asked` and `answers` say what the attempts were about, so that they can be used again where the same is
    asked of the same model, also under another id, label or number of attempts. Rows of earlier versions lack them.
    """

    preference_id: str
    attempts: tuple[bool, ...]
    answers: tuple[Label | None, ...] = ()  # what each attempt said; None: nothing that parses
    content: str = ""  # `ContentKeys.question`
    asked: Mapping[str, Any] = field(default_factory=dict)  # who was asked, and how
    replies: tuple[Reply, ...] = ()  # of each attempt; rows of earlier versions lack them

    def __post_init__(self) -> None:
        if not self.attempts:
            raise ValueError(f"record of {self.preference_id!r} has no attempts: record at least one")
        if self.answers and len(self.answers) != len(self.attempts):
            raise ValueError(
                f"record of {self.preference_id!r} has {len(self.attempts)} attempts and {len(self.answers)} answers"
            )

    @property
    def succeeded(self) -> bool:
        return any(self.attempts)

    @property
    def difficulty(self) -> int:
        """Attempts needed, from 1; one more than were made when none succeeded (4 for the published limit of 3)."""
        return self.attempts.index(True) + 1 if self.succeeded else len(self.attempts) + 1


def count_attempts(answers: Iterable[Label | None], label: Label, limit: int) -> tuple[bool, ...]:
    """Whether each answer is right, up to the first that is, and `limit` at most."""
    outcomes: list[bool] = []
    for answer in answers:
        if len(outcomes) == limit or any(outcomes):
            break
        outcomes.append(answer == label)
    return tuple(outcomes)


def difficulty_of(record: AttemptRecord, label: Label) -> int:
    """Attempts needed to say `label`, which may have been corrected since; one more than were made: none did."""
    if not record.answers:  # rows of earlier versions
        return record.difficulty
    return next((place for place, answer in enumerate(record.answers, 1) if answer == label), len(record.answers) + 1)


def select_hard(records: Iterable[AttemptRecord]) -> list[str]:
    """Ids of the preferences that needed a second attempt or were never solved: the RL set (R1-Reward, section 3).

    The order is the order of the records; of two records of one preference the later one counts.
    """
    latest = {record.preference_id: record for record in records}
    return [identifier for identifier, record in latest.items() if record.difficulty >= 2]


def summary(records: Iterable[AttemptRecord]) -> dict[str, int]:
    """Number of preferences by attempts needed, e.g. {"1": 70, "2": 10, "never": 20}; "never" is always there."""
    latest = {record.preference_id: record for record in records}.values()
    solved = Counter(record.difficulty for record in latest if record.succeeded)
    never = sum(not record.succeeded for record in latest)
    return {**{str(needed): solved[needed] for needed in sorted(solved)}, "never": never}


def append_record(path: Path, record: AttemptRecord) -> None:
    """Append one JSONL row and wait until it is on disk; a torn row that a crash left at the end is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _repair_tail(file, path)
        file.write(json.dumps(asdict(record), ensure_ascii=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(path: Path) -> list[AttemptRecord]:
    """Records of a JSONL file in its order; a torn last row is left out with a warning.

    Raises:
        ValueError: a row other than a torn last one is not a record; the message names file and line.
    """
    records = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_parse(line))
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                logger.warning("%s: left out the torn last line %d", path, number)
                break
            raise ValueError(f"{path}, line {number}: not an attempt record ({error}): repair or remove it") from error
    return records


def _parse(line: bytes) -> AttemptRecord:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("preference_id"), str):
        raise ValueError("no text under 'preference_id'")
    attempts = row.get("attempts")
    if not isinstance(attempts, list) or not all(isinstance(attempt, bool) for attempt in attempts):
        raise ValueError("no list of true and false under 'attempts'")
    answers, content, asked = row.get("answers", []), row.get("content", ""), row.get("asked", {})
    if not isinstance(answers, list) or not all(answer in (1, 2, None) for answer in answers):
        raise ValueError("no list of 1, 2 and null under 'answers'")
    if not isinstance(content, str) or not isinstance(asked, dict):
        raise ValueError("'content' is no text, or 'asked' no object")
    try:
        replies = tuple(Reply(**reply) for reply in row.get("replies", ()))
    except TypeError as error:
        raise ValueError(f"'replies' holds something else than replies: {error}") from error
    return AttemptRecord(
        preference_id=row["preference_id"],
        attempts=tuple(attempts),
        answers=tuple(answers),
        content=content,
        asked=asked,
        replies=replies,
    )


def _repair_tail(file: BinaryIO, path: Path) -> None:
    """Make an append-mode file end with a line break: complete its last row, or cut that off when it is torn."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    content = file.read()
    start = content.rfind(b"\n") + 1
    try:
        _parse(content[start:])
    except ValueError:
        logger.warning("%s: cut off a torn last line of %d bytes", path, size - start)
        file.truncate(start)
    else:
        file.write(b"\n")
