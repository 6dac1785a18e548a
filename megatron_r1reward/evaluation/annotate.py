"""Difficulty annotation: how many attempts does a strong model need to judge a pair as the label says?

The model is behind any OpenAI-compatible endpoint. Images travel inside the request, because a remote endpoint cannot
read our disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from megatron_r1reward.data.difficulty import AttemptRecord, append_record, read_records
from megatron_r1reward.data.image_files import data_url
from megatron_r1reward.data.prompt import preference_messages
from megatron_r1reward.reward.rules import parse_response
from megatron_r1reward.types import Preference

logger = logging.getLogger(__name__)


class UnusableReplyError(Exception):
    """The endpoint answered with something that is not a chat completion."""


# What one sample can fail with and the others survive; ValueError is a reply whose body is not JSON, or its picture.
_FAILURES = (openai.OpenAIError, UnusableReplyError, OSError, ValueError)


@dataclass(frozen=True, kw_only=True)
class _Annotator:
    """A model behind an endpoint, and how it is asked."""

    model: str
    attempts: int
    temperature: float
    max_tokens: int
    concurrency: int
    seed: int

    async def annotate_all(
        self,
        client: openai.AsyncOpenAI,
        preferences: Sequence[Preference],
        output: Path,
        progress: Callable[[int], object],
    ) -> list[AttemptRecord | str]:
        """For each preference its record, which is in `output` then, or the reason why there is none."""
        slots = asyncio.Semaphore(self.concurrency)

        async def one(preference: Preference) -> AttemptRecord | str:
            async with slots:  # holds back the base64 text of waiting images, too
                try:
                    record = await self._annotate(client, preference)
                except _FAILURES as error:
                    return f"{preference.id}: {type(error).__name__}: {error}"
                finally:
                    progress(1)
            append_record(output, record)
            return record

        async with client:
            return await asyncio.gather(*(one(preference) for preference in preferences))

    async def _annotate(self, client: openai.AsyncOpenAI, preference: Preference) -> AttemptRecord:
        """Attempts until the first right verdict. A verdict that does not parse is a wrong attempt."""
        messages = _messages_with_images(preference)
        outcomes: list[bool] = []
        while len(outcomes) < self.attempts and not any(outcomes):
            completion: object = await client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]  # plain dicts of the shape that the API documents
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                seed=_seed_of(self.seed, preference.id, len(outcomes)),
            )
            outcomes.append(parse_response(_text_of(completion)).answer == preference.label)
        return AttemptRecord(preference_id=preference.id, attempts=tuple(outcomes))


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
    progress: Callable[[int], object] | None = None,
) -> list[AttemptRecord]:
    """Up to `attempts` attempts per preference, stopping at the first that agrees with the label (R1-Reward, sec. 3).

    Records are appended to `output` (JSONL) as they complete; a later call skips those that are there. A request is
    retried `max_retries` times with growing, jittered pauses on connection errors, timeouts, 408, 409, 429 and 5xx. A
    preference whose request fails for good is NOT recorded, since "hard" would be a guess: it is counted in one
    warning, and calling again tries it once more.

    Args:
        preferences: judged in their stored answer order.
        base_url: of the endpoint, e.g. "http://host:8000/v1".
        temperature: attempts must be able to differ; each has its own seed.
        concurrency: preferences in flight; the attempts on one preference follow each other.
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
    )
    known = {record.preference_id: record for record in read_records(output)} if output.exists() else {}
    todo = [preference for preference in preferences if preference.id not in known]
    report = progress or (lambda done: None)
    report(len(preferences) - len(todo))
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=max_retries, timeout=timeout_s)
    results = asyncio.run(annotator.annotate_all(client, todo, output, report))
    _report_failures([result for result in results if isinstance(result, str)], len(todo), base_url)
    known |= {result.preference_id: result for result in results if isinstance(result, AttemptRecord)}
    return [known[preference.id] for preference in preferences if preference.id in known]


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


def _seed_of(seed: int, preference_id: str, attempt: int) -> int:
    """A seed of 31 bits, different for every attempt: with equal seeds, attempts at one pair would be copies."""
    digest = hashlib.sha256(f"{seed}/{preference_id}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
