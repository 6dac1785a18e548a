"""Difficulty annotation: how many attempts does a strong model need to judge a pair as the label says?

The model is behind any OpenAI-compatible endpoint. Images travel inside the request, because a remote endpoint cannot
read our disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from megatron_r1reward.data.difficulty import AttemptRecord, Reply, append_record, count_attempts, read_records
from megatron_r1reward.data.identity import ContentKeys, changes
from megatron_r1reward.data.image_files import data_url
from megatron_r1reward.data.prompt import messages_of
from megatron_r1reward.reward.rules import parse_response
from megatron_r1reward.types import Label, Preference

logger = logging.getLogger(__name__)


class UnusableReplyError(Exception):
    """The endpoint answered with something that is not a chat completion."""


class BudgetSpentError(Exception):
    """Nothing more may be asked."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run may spend at an endpoint, attempts of earlier calls with the same output included. Requests in flight
    when it runs out are still paid for."""

    tokens: int | None = None  # prompt and completion
    cost: float | None = None  # in the currency of the prices
    prompt_price: float = 0.0  # of a million tokens
    completion_price: float = 0.0
    requests_per_minute: float | None = None

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6


class _Purse:
    """Keeps a budget while requests run: what is spent, and when the next request may start."""

    def __init__(self, budget: Budget, spent: Iterable[Reply]) -> None:
        self.budget = budget
        self._tokens, self._cost, self._next = 0, 0.0, 0.0
        for reply in spent:
            self.pay(reply)

    def pay(self, reply: Reply) -> None:
        self._tokens += reply.prompt_tokens + reply.completion_tokens
        self._cost += reply.cost

    async def admit(self) -> None:
        """Wait until a request may start. Raises BudgetSpentError when none may."""
        budget = self.budget
        if (budget.tokens is not None and self._tokens >= budget.tokens) or (
            budget.cost is not None and self._cost >= budget.cost
        ):
            raise BudgetSpentError(f"{self._tokens} tokens, cost {self._cost:.4g}")
        if budget.requests_per_minute is not None:
            now = time.monotonic()
            self._next = max(self._next, now) + 60.0 / budget.requests_per_minute
            await asyncio.sleep(self._next - 60.0 / budget.requests_per_minute - now)


# What one sample can fail with and the others survive; ValueError is a reply whose body is not JSON, or its picture.
_FAILURES = (openai.OpenAIError, UnusableReplyError, OSError, ValueError)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A preference, and the answers about it that are known already."""

    preference: Preference
    content: str
    answers: tuple[Label | None, ...] = ()
    replies: tuple[Reply, ...] = ()

    def attempts(self, limit: int) -> tuple[bool, ...]:
        return count_attempts(self.answers, self.preference.known_label, limit)

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
            replies=self.replies[: len(attempts)],
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
        self,
        client: openai.AsyncOpenAI,
        tasks: Sequence[_Task],
        output: Path,
        purse: _Purse,
        progress: Callable[[int], object],
    ) -> list[AttemptRecord | str | BudgetSpentError]:
        """For each task its record, or why there is none. Every attempt is in `output` as soon as it is answered."""
        slots = asyncio.Semaphore(self.concurrency)

        async def one(task: _Task) -> AttemptRecord | str | BudgetSpentError:
            async with slots:  # holds back the base64 text of waiting images, too
                try:
                    return await self._annotate(client, task, output, purse)
                except BudgetSpentError as error:
                    return error
                except _FAILURES as error:
                    return f"{task.preference.id}: {type(error).__name__}: {error}"
                finally:
                    progress(1)

        async with client:
            return await asyncio.gather(*(one(task) for task in tasks))

    async def _annotate(self, client: openai.AsyncOpenAI, task: _Task, output: Path, purse: _Purse) -> AttemptRecord:
        """Attempts until the first right verdict. A verdict that does not parse is a wrong attempt."""
        messages = _messages_with_images(task.preference)
        record = None
        while not task.done(self.attempts):
            await purse.admit()
            seed = _seed_of(self.seed, task.content, len(task.answers))
            completion: object = await client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]  # plain dicts of the shape that the API documents
                temperature=self.temperature,
                max_tokens=self.max_tokens,
                seed=seed,
            )
            reply = _reply_of(completion, seed, purse.budget)
            purse.pay(reply)
            answer = parse_response(reply.text).answer
            task = replace(task, answers=(*task.answers, answer), replies=(*task.replies, reply))
            record = task.record(self.attempts, self.asked)
            append_record(output, record)
        assert record is not None, "what is done already is not asked about"
        return record


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
    budget: Budget | None = None,
    progress: Callable[[int], object] | None = None,
    known_already: Callable[[int], object] | None = None,
) -> list[AttemptRecord]:
    """Up to `attempts` attempts per preference, stopping at the first that agrees with the label (R1-Reward, sec. 3).

    Every attempt is appended to `output` (JSONL) with its text as it is answered; of two rows of one preference the
    later one counts. A later call uses the answers that are there: those to
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
        budget: what may be spent and how fast; when it is spent the rest is left for a later call, with a warning.
        progress: called with a number of preferences just done.
        known_already: called once with the number of those that `output` answers, before anything is asked.

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
        _Task(preference=preference, content=content, **known.get(content, {}))
        for preference, content in zip(preferences, contents, strict=True)
    ]
    found = {task.preference.id: task.record(attempts, annotator.asked) for task in tasks if task.done(attempts)}
    _append_changed(output, found, {record.preference_id: record for record in earlier})
    todo = [task for task in tasks if task.preference.id not in found]
    report, begin = progress or (lambda done: None), known_already or (lambda done: None)
    begin(len(found))
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=max_retries, timeout=timeout_s)
    purse = _Purse(budget or Budget(), _distinct_replies(earlier))
    results = asyncio.run(annotator.annotate_all(client, todo, output, purse, report))
    spent = [result for result in results if isinstance(result, BudgetSpentError)]
    if spent:
        logger.warning(
            "the budget is spent (%s): %d of %d preferences are left; raise annotate.budget_tokens or "
            "annotate.budget_cost and run again to go on",
            spent[0],
            len(spent),
            len(todo),
        )
    _report_failures([result for result in results if isinstance(result, str)], len(todo), base_url)
    found |= {result.preference_id: result for result in results if isinstance(result, AttemptRecord)}
    return [found[preference.id] for preference in preferences if preference.id in found]


def _known_answers(earlier: Sequence[AttemptRecord], asked: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By content, the longest row of answers: shorter ones are its beginnings, as attempt k has a seed of its own."""
    known: dict[str, dict[str, Any]] = {}
    for record in earlier:
        if record.asked == asked and len(record.answers) > len(known.get(record.content, {}).get("answers", ())):
            known[record.content] = {"answers": record.answers, "replies": record.replies}
    return known


def _distinct_replies(earlier: Sequence[AttemptRecord]) -> list[Reply]:
    """Each attempt once, although the rows of a preference hold its earlier attempts, too."""
    found = {
        (record.content, json.dumps(record.asked, sort_keys=True), number): reply
        for record in earlier
        for number, reply in enumerate(record.replies)
    }
    return list(found.values())


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
    messages = messages_of(preference)
    paths = iter(preference.image_paths)
    for message in messages:
        message["content"] = [
            {"type": "image_url", "image_url": {"url": data_url(next(paths))}} if part["type"] == "image" else part
            for part in message["content"]
        ]
    return messages


def _reply_of(completion: object, seed: int, budget: Budget) -> Reply:
    # The client does not validate replies: a proxy's HTML page, or JSON of any shape, arrives here as it is.
    match completion:
        case ChatCompletion(choices=[first, *_]) if hasattr(first, "message"):
            usage = completion.usage
            prompt = getattr(usage, "prompt_tokens", None) or 0
            written = getattr(usage, "completion_tokens", None) or 0
            return Reply(
                text=first.message.content or "",  # empty: a refusal, which is a wrong attempt
                seed=seed,
                finish_reason=first.finish_reason or "",
                prompt_tokens=prompt,
                completion_tokens=written,
                cost=budget.price(prompt, written),
            )
        case _:
            raise UnusableReplyError(f"not a chat completion: {str(completion)[:200]!r}")


def _seed_of(seed: int, content: str, attempt: int) -> int:
    """A seed of 31 bits, different for every attempt: with equal seeds, attempts at one pair would be copies."""
    digest = hashlib.sha256(f"{seed}/{content}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
