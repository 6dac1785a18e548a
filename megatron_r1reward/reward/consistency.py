"""Ask a judge whether the reasoning of a response supports its verdict."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import cycle
from typing import Final

import openai

from megatron_r1reward.config.schema import JudgeSection
from megatron_r1reward.data.prompt import judge_messages
from megatron_r1reward.reward.judge_endpoint import JudgeEndpoint, UnusableReplyError
from megatron_r1reward.types import JudgeVerdict, Label

logger = logging.getLogger(__name__)

_FAILURES = (openai.OpenAIError, json.JSONDecodeError, UnusableReplyError)
_REPLIES: Final[Mapping[str, JudgeVerdict]] = {"1": "consistent", "0": "inconsistent"}
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 8.0


@dataclass(frozen=True, kw_only=True)
class _Question:
    tail: str  # the last lines of the reasoning
    answer: Label


class ConsistencyJudge:
    """A pool of OpenAI-compatible servers that judge consistency from text alone: no image, no question.

    A call is never fatal. It is tried `section.retries + 1` times, each time on the next server; when none of them gave
    a usable reply the verdict is "unknown", and one log line per batch names a reason. Usable verdicts are remembered
    by (last lines, answer); "unknown" is not.

    Raises:
        ValueError: no urls.
    """

    def __init__(self, section: JudgeSection, urls: Sequence[str]) -> None:
        if not urls:
            raise ValueError("the judge has no server: set judge.urls or judge.model_path, or reward.use_judge = false")
        self._section = section
        self._urls = tuple(urls)
        self._verdicts: dict[_Question, JudgeVerdict] = {}

    async def judge(self, reasoning: str, answer: Label) -> JudgeVerdict:
        """Whether `reasoning` ends up supporting "Response `answer` is better"."""
        return (await self.judge_many([(reasoning, answer)]))[0]

    async def judge_many(self, cases: Sequence[tuple[str, Label]]) -> list[JudgeVerdict]:
        """Verdicts of (reasoning, answer) pairs, in their order; at most `max_concurrency` calls per server at once.

        The judge sees the last `section.reasoning_lines` non-empty lines, as in the released code. Empty reasoning
        supports nothing: it is "inconsistent" without a call.
        """
        questions = [
            _Question(tail=_last_lines(reasoning, self._section.reasoning_lines), answer=answer)
            for reasoning, answer in cases
        ]
        answered = await self._ask_all(list(dict.fromkeys(q for q in questions if q.tail and q not in self._verdicts)))
        self._verdicts |= {question: verdict for question, verdict in answered.items() if verdict != "unknown"}
        known = self._verdicts | answered
        return [known[question] if question.tail else "inconsistent" for question in questions]

    async def _ask_all(self, questions: Sequence[_Question]) -> dict[_Question, JudgeVerdict]:
        if not questions:
            return {}
        # Connections belong to an event loop, and each call may run in a new one.
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(JudgeEndpoint(self._section, url)) for url in self._urls]
            slots = asyncio.Semaphore(self._section.max_concurrency * len(servers))
            answers = await asyncio.gather(
                *(self._ask(question, _rotated(servers, i), slots) for i, question in enumerate(questions))
            )
        failures = [answer for answer in answers if isinstance(answer, Exception)]
        if failures:
            logger.warning(
                "judge: no verdict on %d of %d questions after %d attempts each; the last reason: %r",
                len(failures),
                len(questions),
                self._section.retries + 1,
                failures[-1],
            )
        return {
            question: "unknown" if isinstance(answer, Exception) else answer
            for question, answer in zip(questions, answers, strict=True)
        }

    async def _ask(
        self, question: _Question, servers: Sequence[JudgeEndpoint], slots: asyncio.Semaphore
    ) -> JudgeVerdict | Exception:
        """The verdict, or why there is none."""
        messages = judge_messages(question.tail, f"Response {question.answer} is better.")
        reason: Exception | None = None
        for attempt, server in zip(range(self._section.retries + 1), cycle(servers)):
            if attempt:
                await asyncio.sleep(_pause_s(attempt))
            try:
                async with slots:
                    return _read_verdict(await server.reply(messages))
            except _FAILURES as failure:
                reason = failure
        assert reason is not None, "retries >= 0: at least one attempt was made"
        return reason


def _rotated(servers: Sequence[JudgeEndpoint], start: int) -> Sequence[JudgeEndpoint]:
    """All servers, beginning with number `start`, round robin."""
    start %= len(servers)
    return [*servers[start:], *servers[:start]]


def _last_lines(reasoning: str, count: int) -> str:
    lines = [line.strip() for line in reasoning.splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def _read_verdict(reply: str) -> JudgeVerdict:
    verdict = _REPLIES.get(reply.strip())
    if verdict is None:
        raise UnusableReplyError(f"expected exactly '1' or '0', got {reply[:200]!r}")
    return verdict


def _pause_s(attempt: int) -> float:
    """Exponential backoff with jitter: a restarted server is not hit by all callers at once."""
    return random.uniform(0.5, 1.0) * min(_FIRST_PAUSE_S * 2 ** (attempt - 1), _LONGEST_PAUSE_S)
