"""Difficulty annotation: how many attempts does a strong model need to judge a pair as the label says?

The model is behind any OpenAI-compatible endpoint. Images travel inside the request, because a remote endpoint cannot
read our disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from megatron_r1reward.data.difficulty import AttemptRecord, append_record, count_attempts, read_records
from megatron_r1reward.data.identity import ContentKeys, changes
from megatron_r1reward.data.image_files import data_url
from megatron_r1reward.data.prompt import preference_messages
from megatron_r1reward.reward.rules import parse_response
from megatron_r1reward.types import Label, Preference

logger = logging.getLogger(__name__)


class UnusableReplyError(Exception):
    """The endpoint answered with something that is not a chat completion."""


# What one sample can fail with and the others survive; ValueError is a reply whose body is not JSON, or its picture.
_FAILURES = (openai.OpenAIError, UnusableReplyError, OSError, ValueError)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A preference, and the answers about it that are known already."""

    preference: Preference
    content: str
    answers: tuple[Label | None, ...] = ()

    def attempts(self, limit: int) -> tuple[bool, ...]:
        return count_attempts(self.answers, self.preference.label, limit)

    def done(self, limit: int) -> bool:
        attempts = self.attempts(limit)
        return any(attempts) or len(attempts) == limit

    def record(self, limit: int, asked: Mapping[str, Any]) -> AttemptRecord:
        attempts = self.attempts(limit)
        return AttemptRecord(
            preference_id=self.preference.id,
            attempts=attempts,
            answers=self.answers[: len(attempts)],
            content=self.content,
            asked=asked,
        )


@dataclass(frozen=True, kw_only=True)
class _Annotator:
    """A model behind an endpoint, and how it is asked."""

    model: str
    attempts: int
    temperature: float
    max_tokens: int
    concurrency: int
    seed: int
    served: Mapping[str, Any]  # what is known of the model behind the name

    @property
    def asked(self) -> dict[str, Any]:
        """What decides an answer besides the question. The number of attempts does not."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            **self.served,
        }

    async def annotate_all(
        self, client: openai.AsyncOpenAI, tasks: Sequence[_Task], output: Path, progress: Callable[[int], object]
    ) -> list[AttemptRecord | str]:
        """For each task its record, which is in `output` then, or the reason why there is none."""
        slots = asyncio.Semaphore(self.concurrency)

        async def one(task: _Task) -> AttemptRecord | str:
            async with slots:  # holds back the base64 text of waiting images, too
                try:
                    record = (await self._annotate(client, task)).record(self.attempts, self.asked)
                except _FAILURES as error:
                    return f"{task.preference.id}: {type(error).__name__}: {error}"
                finally:
                    progress(1)
            append_record(output, record)
            return record

        async with client:
            return await asyncio.gather(*(one(task) for task in tasks))

    async def _annotate(self, client: openai.AsyncOpenAI, task: _Task) -> _Task:
        """Attempts until the first right verdict. A verdict that does not parse is a wrong attempt."""
        messages = _messages_with_images(task.preference)
        while not task.done(self.attempts):
            completion: object = await client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]  # plain dicts of the shape that the API documents
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                seed=_seed_of(self.seed, task.content, len(task.answers)),
            )
            answer = parse_response(_text_of(completion)).answer
            task = replace(task, answers=(*task.answers, answer))
        return task


def annotate(
    preferences: Sequence[Preference],
    *,
    base_url: str,
    model: str,
    api_key: str,
    attempts: int = 3,
    temperature: float = 1.0,
    max_tokens: int = 1024,
    concurrency: int = 32,
    max_retries: int = 5,
    timeout_s: float = 600.0,
    output: Path,
    seed: int = 0,
    served: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[AttemptRecord]:
    """Up to `attempts` attempts per preference, stopping at the first that agrees with the label (R1-Reward, sec. 3).

    Records are appended to `output` (JSONL) as they complete. A later call uses the answers that are there: those to
    the same question (texts and bytes of the images, whatever the id) by the same model, asked in the same way. A
    corrected label or another limit counts them anew, and only what is missing is asked. A request is retried
    `max_retries` times with growing, jittered pauses on connection errors, timeouts, 408, 409, 429 and 5xx. A
    preference whose request fails for good is NOT recorded, since "hard" would be a guess: it is counted in one
    warning, and calling again tries it once more.

    Args:
        preferences: judged in their stored answer order.
        base_url: of the endpoint, e.g. "http://host:8000/v1".
        temperature: attempts must be able to differ; each has its own seed.
        concurrency: preferences in flight; the attempts on one preference follow each other.
        served: what is known of the model behind its name, e.g. `model_identity` of a folder; JSON.
        progress: called with a number of preferences just done, those found in `output` first.

    Returns:
        One record per annotated preference, in the order of `preferences`.

    Raises:
        ValueError: `attempts` or `concurrency` is not positive.
        RuntimeError: every preference failed; the message holds the first reason.
    """
    if attempts < 1 or concurrency < 1:
        raise ValueError(f"attempts {attempts} and concurrency {concurrency} must be at least 1")
    annotator = _Annotator(
        model=model,
        attempts=attempts,
        temperature=temperature,
        max_tokens=max_tokens,
        concurrency=concurrency,
        seed=seed,
        served=served or {},
    )
    earlier = read_records(output) if output.exists() else []
    keys = ContentKeys()
    contents = [keys.question(preference) for preference in preferences]
    known = _known_answers(earlier, annotator.asked)
    _report_unusable(earlier, annotator.asked, output)
    tasks = [
        _Task(preference=preference, content=content, answers=known.get(content, ()))
        for preference, content in zip(preferences, contents, strict=True)
    ]
    found = {task.preference.id: task.record(attempts, annotator.asked) for task in tasks if task.done(attempts)}
    _append_changed(output, found, {record.preference_id: record for record in earlier})
    todo = [task for task in tasks if task.preference.id not in found]
    report = progress or (lambda done: None)
    report(len(found))
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=max_retries, timeout=timeout_s)
    results = asyncio.run(annotator.annotate_all(client, todo, output, report))
    _report_failures([result for result in results if isinstance(result, str)], len(todo), base_url)
    found |= {result.preference_id: result for result in results if isinstance(result, AttemptRecord)}
    return [found[preference.id] for preference in preferences if preference.id in found]


def _known_answers(earlier: Sequence[AttemptRecord], asked: Mapping[str, Any]) -> dict[str, tuple[Label | None, ...]]:
    """By content, the longest row of answers: shorter ones are its beginnings, as attempt k has a seed of its own."""
    known: dict[str, tuple[Label | None, ...]] = {}
    for record in earlier:
        if record.asked == asked and len(record.answers) > len(known.get(record.content, ())):
            known[record.content] = record.answers
    return known


def _report_unusable(earlier: Sequence[AttemptRecord], asked: Mapping[str, Any], output: Path) -> None:
    unknown = sum(not record.answers for record in earlier)
    if unknown:
        logger.warning(
            "%s: %d records of an earlier version do not say what was asked; those preferences are asked about again",
            output,
            unknown,
        )
    others = [record.asked for record in earlier if record.answers and record.asked != asked]
    if others:
        difference = changes(others[-1], asked)
        logger.warning("%s: %d records were asked otherwise and are not used (%s)", output, len(others), difference)


def _append_changed(output: Path, found: Mapping[str, AttemptRecord], earlier: Mapping[str, AttemptRecord]) -> None:
    """What known answers say under today's ids, labels and limit goes to the file, too."""
    changed = [record for name, record in found.items() if record != earlier.get(name)]
    if changed:
        logger.warning(
            "%s: %d preferences have another id, label or limit of attempts than when they were annotated; their "
            "answers are counted anew",
            output,
            len(changed),
        )
    for record in changed:
        append_record(output, record)


def _report_failures(failures: Sequence[str], asked: int, base_url: str) -> None:
    if failures and len(failures) == asked:
        raise RuntimeError(f"all {asked} preferences failed at {base_url}, the first with {failures[0]}")
    if failures:
        logger.warning(
            "%d of %d preferences could not be annotated and are not recorded, the first: %s. Run again to retry them.",
            len(failures),
            asked,
            failures[0],
        )


def _messages_with_images(preference: Preference) -> list[dict[str, Any]]:
    """The reward-model prompt with every image placeholder filled in."""
    messages = preference_messages(preference.question, preference.responses, len(preference.image_paths))
    paths = iter(preference.image_paths)
    for message in messages:
        message["content"] = [
            {"type": "image_url", "image_url": {"url": data_url(next(paths))}} if part["type"] == "image" else part
            for part in message["content"]
        ]
    return messages


def _text_of(completion: object) -> str:
    # The client does not validate replies: a proxy's HTML page, or JSON of any shape, arrives here as it is.
    match completion:
        case ChatCompletion(choices=[first, *_]) if hasattr(first, "message"):
            return first.message.content or ""  # empty: a refusal, which is a wrong attempt
        case _:
            raise UnusableReplyError(f"not a chat completion: {str(completion)[:200]!r}")


def _seed_of(seed: int, content: str, attempt: int) -> int:
    """A seed of 31 bits, different for every attempt: with equal seeds, attempts at one pair would be copies."""
    digest = hashlib.sha256(f"{seed}/{content}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
