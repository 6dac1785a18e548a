"""Ask a judge whether the reasoning of a response supports its verdict."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType
from typing import Any, Final, Self

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_r1reward.config.schema import JudgeSection
from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.data.prompt import judge_messages
from megatron_r1reward.network.breaker import CircuitBreaker
from megatron_r1reward.network.tokens import TOKEN_VARIABLE
from megatron_r1reward.reward.verdict_cache import VerdictCache, question_key
from megatron_r1reward.types import JudgeVerdict, Label

logger = logging.getLogger(__name__)

Endpoints = Callable[[], Sequence[tuple[str, str | None]]]  # (url, token) of the servers in service


class UnusableReplyError(Exception):
    """The server answered, but not with what was asked for."""


_FAILURES = (openai.OpenAIError, json.JSONDecodeError, UnusableReplyError)
_REPLIES: Final[Mapping[str, JudgeVerdict]] = {"1": "consistent", "0": "inconsistent"}


class JudgeDownError(RuntimeError):
    """The judge has given no verdict for more steps than the run may go on without."""


@dataclass(frozen=True, kw_only=True)
class _Question:
    tail: str  # the last lines of the reasoning
    answer: Label

    @property
    def messages(self) -> list[dict[str, Any]]:
        return judge_messages(self.tail, f"Response {self.answer} is better.")


class ConsistencyJudge:
    """OpenAI-compatible servers that judge consistency from text alone: no image, no question.

    A failed call is tried `section.retries` times more, each time on the next server; when none of them gave a usable
    reply the verdict is "unknown", and one log line per batch names a reason. After `breaker_failures` questions in a
    row without a verdict the rest of the batch is not asked; the next batch begins with one trial question. When no
    question got a verdict in more than `max_steps_without_judge` batches in a row, `judge_many` raises.

    Usable verdicts are remembered in `cache` by everything that decides them; "unknown" is not.

    Args:
        servers: base URLs, with the key in the environment variable `section.api_key_variable`; or a function that
            gives those (url, token) that are in service now.

    Raises:
        ValueError: no servers.
    """

    def __init__(
        self, section: JudgeSection, servers: Sequence[str] | Endpoints, *, cache: VerdictCache | None = None
    ) -> None:
        if not servers:
            raise ValueError("the judge has no server: set judge.urls or judge.model_path, or reward.use_judge = false")
        self._section = section
        self._servers = servers
        self._cache = cache or VerdictCache(None)
        self._identity = _identity(section)
        self._models: dict[str, str] = {}
        self._breaker = CircuitBreaker(section.breaker_failures)
        self._steps_without = 0
        self.counts: Counter[str] = Counter()  # of the last batch: calls, cached, over_budget, not_tried, steps_without

    async def judge(self, reasoning: str, answer: Label) -> JudgeVerdict:
        """Whether `reasoning` ends up supporting "Response `answer` is better"."""
        return (await self.judge_many([(reasoning, answer)]))[0]

    async def judge_many(self, cases: Sequence[tuple[str, Label]]) -> list[JudgeVerdict]:
        """Verdicts of (reasoning, answer) pairs, in their order; at most `max_concurrency` calls per server at once.

        The judge sees the last `section.reasoning_lines` non-empty lines, as in the released code. Empty reasoning
        supports nothing: it is "inconsistent" without a call.

        Raises:
            JudgeDownError: see the class.
        """
        questions = [
            _Question(tail=_last_lines(reasoning, self._section.reasoning_lines), answer=answer)
            for reasoning, answer in cases
        ]
        keys = {question: self._key(question) for question in questions if question.tail}
        known = self._cache.get(list(keys.values()))
        new = [question for question, key in keys.items() if key not in known]
        budget = self._section.max_calls_per_step
        asked = new if budget is None else new[:budget]
        self.counts = Counter(cached=len(keys) - len(new), over_budget=len(new) - len(asked))
        answered = await self._ask_all(asked)
        usable = {keys[question]: verdict for question, verdict in answered.items() if verdict != "unknown"}
        self._cache.add(usable)
        self._watch(asked=len(asked), usable=len(usable))
        known |= usable
        return [known.get(keys[q], "unknown") if q.tail else "inconsistent" for q in questions]

    def _key(self, question: _Question) -> str:
        settings = {"temperature": self._section.temperature, "max_tokens": self._section.max_tokens}
        return question_key(self._identity, settings, question.messages)

    def _watch(self, *, asked: int, usable: int) -> None:
        if asked == 0:
            return  # says nothing about the judge
        self._steps_without = 0 if usable else self._steps_without + 1
        self.counts["steps_without"] = self._steps_without
        limit = self._section.max_steps_without_judge
        if self._steps_without > limit:
            raise JudgeDownError(
                f"the judge gave no verdict on {asked} questions, nor in the {limit} steps before; see its log; "
                "the run may go on without it if reward.use_judge = false"
            )
        if self._steps_without:
            logger.warning(
                "judge: no verdict at all, C is 0; %d of at most %d such steps in a row", self._steps_without, limit
            )

    def _endpoints(self) -> Sequence[tuple[str, str | None]]:
        if callable(self._servers):
            return self._servers()
        key = os.environ.get(self._section.api_key_variable)
        return [(url, key) for url in self._servers]

    async def _ask_all(self, questions: Sequence[_Question]) -> dict[_Question, JudgeVerdict]:
        if not questions:
            return {}
        self._breaker.half_open()
        # Connections belong to an event loop, and each call may run in a new one.
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(
                    JudgeEndpoint(self._section, url, key=key or "none", models=self._models)
                )
                for url, key in self._endpoints()
            ]
            slots = asyncio.Semaphore(self._section.max_concurrency * len(servers))
            first = []
            if self._breaker.state == "half_open":  # one trial tells whether the others are worth their time-outs
                first = [await self._ask(questions[0], servers, slots)]
            rest = enumerate(questions[len(first) :], start=len(first))
            answers = first + await asyncio.gather(*(self._ask(q, _rotated(servers, i), slots) for i, q in rest))
        failures = [answer for answer in answers if isinstance(answer, Exception)]
        if failures:
            logger.warning(
                "judge: no verdict on %d of %d questions after %d attempts each (%d not tried); the last reason: %r",
                len(failures) + self.counts["not_tried"],
                len(questions),
                self._section.retries + 1,
                self.counts["not_tried"],
                failures[-1],
            )
        return {
            q: answer if isinstance(answer, str) else "unknown" for q, answer in zip(questions, answers, strict=True)
        }

    async def _ask(
        self, question: _Question, servers: Sequence[JudgeEndpoint], slots: asyncio.Semaphore
    ) -> JudgeVerdict | Exception | None:
        """The verdict, or why there is none; None when the breaker is open."""
        server = cycle(servers)
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_FAILURES),
            stop=stop_after_attempt(self._section.retries + 1),
            # Full jitter: a restarted server is not hit by all callers at once.
            wait=wait_random_exponential(multiplier=self._section.backoff_s, max=self._section.backoff_max_s),
            reraise=True,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    async with slots:
                        if attempt.retry_state.attempt_number == 1 and not self._breaker.admits():
                            self.counts["not_tried"] += 1
                            return None
                        self.counts["calls"] += 1
                        verdict = _read_verdict(await next(server).reply(question.messages))
        except _FAILURES as failure:
            self._breaker.failure()
            return failure
        self._breaker.success()
        return verdict


def _identity(section: JudgeSection) -> str:
    """Whose verdicts are remembered. Neither name nor address says which weights a server of ours serves."""
    ours = not section.urls or section.api_key_variable == TOKEN_VARIABLE  # what a supervisor sets for its servers
    if ours and section.model_path is not None:
        return model_identity(section.model_path)
    return section.model or " ".join(section.urls)


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


class JudgeEndpoint:
    """A connection to one server; an async context manager that belongs to one event loop.

    Args:
        key: the API key or bearer token.
        models: names of the models that servers serve, by URL; filled when a server is asked for the first time, and
            kept by the caller for the next connection.
    """

    def __init__(self, section: JudgeSection, url: str, *, key: str, models: MutableMapping[str, str]) -> None:
        root = url.rstrip("/")
        self._url = root
        self._section = section
        self._models = models
        self._client = openai.AsyncOpenAI(
            base_url=root if root.endswith("/v1") else f"{root}/v1",
            api_key=key,
            timeout=section.request_timeout_s,
            max_retries=0,  # the caller retries, on another server where there is one
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def reply(self, messages: list[dict[str, Any]]) -> str:
        """The model's reply to a chat.

        Raises:
            openai.OpenAIError: the server cannot be reached, is too slow, or refuses.
            json.JSONDecodeError, UnusableReplyError: the server's answer is not a chat completion with text.
        """
        completion: object = await self._client.chat.completions.create(
            model=await self._model_name(),
            messages=messages,  # type: ignore[arg-type]  # plain dicts of the shape that the API documents
            temperature=self._section.temperature,
            max_tokens=self._section.max_tokens,
        )
        # The client does not validate replies: a proxy's HTML page, or JSON of any shape, arrives here as it is.
        match completion:
            case ChatCompletion(choices=[Choice(message=ChatCompletionMessage(content=str(text))), *_]):
                return text
            case _:
                raise UnusableReplyError(f"not a chat completion: {str(completion)[:200]!r}")

    async def _model_name(self) -> str:
        """`judge.model`, or the first model that the server lists; a server is asked once in its life."""
        if self._section.model is not None:
            return self._section.model
        # No lock: callers that start together may all ask, which is cheaper than queueing behind a server that hangs.
        if self._url not in self._models:
            match await self._client.get("/models", cast_to=object):
                case {"data": [{"id": str(name)}, *_]}:
                    self._models[self._url] = name
                case listing:
                    raise UnusableReplyError(f"not a list of models: {str(listing)[:200]!r}")
        return self._models[self._url]
