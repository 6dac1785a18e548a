"""Ask a judge whether the reasoning of a response supports its verdict."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType
from typing import Any, Final, Self

import openai
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from tenacity import AsyncRetrying, AttemptManager, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_r1reward.config.schema import JudgeSection
from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.data.prompt import judge_messages
from megatron_r1reward.monitor.timers import BusyClock
from megatron_r1reward.network.breaker import CircuitBreaker
from megatron_r1reward.network.tokens import TOKEN_VARIABLE
from megatron_r1reward.reward.verdict_cache import VerdictCache, question_key
from megatron_r1reward.types import JudgeVerdict, Label

logger = logging.getLogger(__name__)

Endpoints = Callable[[], Sequence[tuple[str, str | None]]]  # (url, token) of the servers in service


class UnusableReplyError(Exception):
    """The server answered, but not with what was asked for."""


class UnreadableReplyError(UnusableReplyError):
    """The judge said something, but no verdict."""


_FAILURES = (openai.OpenAIError, json.JSONDecodeError, UnusableReplyError)
_REPLIES: Final[Mapping[str, JudgeVerdict]] = {"1": "consistent", "0": "inconsistent"}
_CHOICE = re.compile(r"(?<![\w.,])[01](?!\w|[.,]\d)")
_RETRY_TEMPERATURE = 1.0  # of a judge at temperature 0 that said nothing usable: it would say the same again


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
    question got a verdict in more than `max_steps_without_judge` batches in a row, the batch's verdicts raise; replies
    that are no verdict only cost the bonus, because the judge is there.

    A server that knows vLLM's structured outputs is made to answer "1" or "0". What others say is read leniently: one
    of the two must stand in it, the other not. A reply without a verdict is asked for again with another seed.

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
        self.section = section
        self.cache = cache or VerdictCache(None)
        self.models: dict[str, str] = {}  # that servers serve, by URL
        self.clocks: dict[str, BusyClock] = {}  # calls in flight, by URL
        self.free: set[str] = set()  # URLs of servers that do not constrain replies
        self.breaker = CircuitBreaker(section.breaker_failures)
        self._servers = servers
        self.identity = judge_identity(section)
        self._steps_without = 0
        self.counts: Counter[str] = Counter()  # of the last batch: calls, cached, over_budget, not_tried, steps_without

    async def judge(self, reasoning: str, answer: Label) -> JudgeVerdict:
        """Whether `reasoning` ends up supporting "Response `answer` is better"."""
        return (await self.judge_many([(reasoning, answer)]))[0]

    async def judge_many(self, cases: Sequence[tuple[str, Label]]) -> list[JudgeVerdict]:
        """Verdicts of (reasoning, answer) pairs, in their order. Raises JudgeDownError, see the class."""
        async with JudgeBatch(self) as batch:
            return await batch.verdicts(cases)

    def endpoints(self) -> Sequence[tuple[str, str | None]]:
        if callable(self._servers):
            return self._servers()
        key = os.environ.get(self.section.api_key_variable)
        return [(url, key) for url in self._servers]

    def watch(self, counts: Counter[str], *, asked: int, usable: int) -> None:
        """The end of a batch: raises JudgeDownError after too many without a verdict."""
        self.counts = counts
        if asked == 0:
            return  # says nothing about the judge
        if not usable and counts["unreadable"]:
            logger.warning("judge: %d replies and not one verdict, C is 0: use a judge that replies 1 or 0", asked)
            return
        self._steps_without = 0 if usable else self._steps_without + 1
        counts["steps_without"] = self._steps_without
        limit = self.section.max_steps_without_judge
        if self._steps_without > limit:
            raise JudgeDownError(
                f"the judge gave no verdict on {asked} questions, nor in the {limit} steps before; see its log; "
                "the run may go on without it if reward.use_judge = false"
            )
        if self._steps_without:
            logger.warning(
                "judge: no verdict at all, C is 0; %d of at most %d such steps in a row", self._steps_without, limit
            )


class JudgeBatch:
    """The questions of one step, asked as they come: an async context manager, inside an event loop.

    At most `max_concurrency` calls per server are made at once; equal questions are asked once. The judge sees the last
    `section.reasoning_lines` non-empty lines, as in the released code. Empty reasoning supports nothing: it is
    "inconsistent" without a call. Of more than `max_calls_per_step` questions the first are asked.
    """

    def __init__(self, judge: ConsistencyJudge) -> None:
        self._judge, self._section = judge, judge.section
        self._clients: dict[tuple[str, str | None], JudgeEndpoint] = {}
        self._asked: dict[_Question, asyncio.Task[JudgeVerdict | Exception | None]] = {}
        self._known: dict[_Question, JudgeVerdict] = {}
        self._slots: asyncio.Semaphore | None = None
        self._trial: asyncio.Task[Any] | None = None
        self.counts_questions = self._section.max_calls_per_step is not None  # then it matters which come first
        self.counts: Counter[str] = Counter()  # as `ConsistencyJudge.counts`

    async def __aenter__(self) -> Self:
        self._judge.breaker.half_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Give up what is being asked."""
        for task in self._asked.values():
            task.cancel()  # does nothing to a finished one
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        for client in self._clients.values():
            await client.close()

    def ask(self, cases: Iterable[tuple[str, Label]]) -> None:
        """Begin to ask about (reasoning, answer) pairs; returns at once."""
        questions = dict.fromkeys(map(self._question, cases))
        new = [q for q in questions if q.tail and q not in self._known and q not in self._asked]
        keys = {question: self._key(question) for question in new}
        found = self._judge.cache.get(list(keys.values()))
        for question in new:
            budget = self._section.max_calls_per_step
            if keys[question] in found:
                self._known[question] = found[keys[question]]
                self.counts["cached"] += 1
            elif budget is not None and len(self._asked) >= budget:
                self._known[question] = "unknown"
                self.counts["over_budget"] += 1
            else:
                servers = _rotated(self._connections(), len(self._asked))
                task = asyncio.create_task(self._after_trial(question, servers))
                if not self._asked and self._judge.breaker.state == "half_open":
                    self._trial = task  # one tells whether the others are worth their time-outs
                self._asked[question] = task

    async def verdicts(self, cases: Sequence[tuple[str, Label]]) -> list[JudgeVerdict]:
        """The end of the batch: the verdicts of `cases`, in their order; those that have not been asked are now.

        Raises:
            JudgeDownError: see `ConsistencyJudge`.
        """
        self.ask(cases)
        answers = dict(zip(self._asked, await asyncio.gather(*self._asked.values()), strict=True))
        self._report([answer for answer in answers.values() if isinstance(answer, Exception)])
        usable = {question: answer for question, answer in answers.items() if isinstance(answer, str)}
        self._judge.cache.add({self._key(question): verdict for question, verdict in usable.items()})
        self._judge.watch(self.counts, asked=len(answers), usable=len(usable))
        known = self._known | usable
        return [known.get(q, "unknown") if q.tail else "inconsistent" for q in map(self._question, cases)]

    def _question(self, case: tuple[str, Label]) -> _Question:
        reasoning, answer = case
        return _Question(tail=_last_lines(reasoning, self._section.reasoning_lines), answer=answer)

    def _key(self, question: _Question) -> str:
        settings = {"temperature": self._section.temperature, "max_tokens": self._section.max_tokens}
        return question_key(self._judge.identity, settings, question.messages)

    def _connections(self) -> list[JudgeEndpoint]:
        """To the servers in service now. Connections belong to an event loop, and each batch may run in a new one."""
        wanted = self._judge.endpoints()
        for url, key in wanted:
            if (url, key) not in self._clients:
                client = JudgeEndpoint(
                    self._section, url, key=key or "none", models=self._judge.models, free=self._judge.free
                )
                self._clients[url, key] = client
        self._slots = self._slots or asyncio.Semaphore(self._section.max_concurrency * len(wanted))
        return [self._clients[address] for address in wanted]

    def _report(self, failures: Sequence[Exception]) -> None:
        if failures:
            logger.warning(
                "judge: no verdict on %d of %d questions after %d attempts each (%d not tried); the last reason: %r",
                len(failures) + self.counts["not_tried"],
                len(self._asked),
                self._section.retries + 1,
                self.counts["not_tried"],
                failures[-1],
            )

    async def _after_trial(
        self, question: _Question, servers: Sequence[JudgeEndpoint]
    ) -> JudgeVerdict | Exception | None:
        if self._trial is not None and self._trial is not asyncio.current_task():
            await asyncio.wait([self._trial])
        return await self._ask(question, servers)

    async def _ask(self, question: _Question, servers: Sequence[JudgeEndpoint]) -> JudgeVerdict | Exception | None:
        """The verdict, or why there is none; None when the breaker is open."""
        assert self._slots is not None
        unreadable = 0
        server = cycle(servers)
        breaker = self._judge.breaker
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
                    async with self._slots:
                        if attempt.retry_state.attempt_number == 1 and not breaker.admits():
                            self.counts["not_tried"] += 1
                            return None
                        self.counts["calls"] += 1
                        endpoint = next(server)
                        with self._judge.clocks.setdefault(endpoint.url, BusyClock()).busy():
                            verdict = _read_verdict(await endpoint.reply(question.messages, retry=unreadable))
                if isinstance(_failure_of(attempt), UnreadableReplyError):
                    unreadable += 1
        except UnreadableReplyError as failure:
            self.counts["unreadable"] += 1
            breaker.success()  # it is there
            return failure
        except _FAILURES as failure:
            breaker.failure()
            return failure
        breaker.success()
        return verdict


def judge_identity(section: JudgeSection) -> str:
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


def _failure_of(attempt: AttemptManager) -> BaseException | None:
    outcome = attempt.retry_state.outcome
    return None if outcome is None else outcome.exception()


def _read_verdict(reply: str) -> JudgeVerdict:
    """The one of "1" and "0" that a reply holds, as in `**1**`, `Output: 1.` or after a reasoning in <think>."""
    said = set(_CHOICE.findall(reply.rpartition("</think>")[2]))
    if len(said) != 1:
        raise UnreadableReplyError(f"expected '1' or '0', got {reply[:200]!r}")
    return _REPLIES[said.pop()]


class JudgeEndpoint:
    """A connection to one server; belongs to one event loop.

    Args:
        key: the API key or bearer token.
        models: names of the models that servers serve, by URL; filled when a server is asked for the first time, and
            kept by the caller for the next connection.
        free: URLs of servers that refuse to constrain their replies; filled and kept in the same way.
    """

    def __init__(
        self, section: JudgeSection, url: str, *, key: str, models: MutableMapping[str, str], free: set[str]
    ) -> None:
        root = url.rstrip("/")
        self.url = root
        self._section = section
        self._models = models
        self._free = free
        self._client = openai.AsyncOpenAI(
            base_url=root if root.endswith("/v1") else f"{root}/v1",
            api_key=key,
            timeout=section.request_timeout_s,
            max_retries=0,  # the caller retries, on another server where there is one
        )

    async def close(self) -> None:
        await self._client.close()

    async def reply(self, messages: list[dict[str, Any]], *, retry: int = 0) -> str:
        """The model's reply to a chat.

        Args:
            retry: how many replies to it were no verdict; each gets a seed of its own, and a temperature above 0.

        Raises:
            openai.OpenAIError: the server cannot be reached, is too slow, or refuses.
            json.JSONDecodeError, UnusableReplyError: the server's answer is not a chat completion with text.
        """
        model = await self._model_name()
        try:
            completion = await self._complete(model, messages, retry, constrained=self.url not in self._free)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            if self.url in self._free:
                raise
            # Not a vLLM, or it has no backend for this tokenizer. If it refuses the plain question too, that is why.
            completion = await self._complete(model, messages, retry, constrained=False)
            self._free.add(self.url)
            logger.info("judge %s does not constrain its replies; they are read leniently", self.url)
        # The client does not validate replies: a proxy's HTML page, or JSON of any shape, arrives here as it is.
        match completion:
            case ChatCompletion(choices=[Choice(message=ChatCompletionMessage(content=str(text))), *_]):
                return text
            case _:
                raise UnusableReplyError(f"not a chat completion: {str(completion)[:200]!r}")

    async def _complete(self, model: str, messages: list[dict[str, Any]], retry: int, *, constrained: bool) -> object:
        temperature = self._section.temperature
        return await self._client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]  # plain dicts of the shape that the API documents
            temperature=temperature if retry == 0 else max(temperature, _RETRY_TEMPERATURE),
            max_tokens=self._section.max_tokens,
            seed=retry or openai.omit,
            extra_body={"structured_outputs": {"choice": list(_REPLIES)}} if constrained else None,
        )

    async def _model_name(self) -> str:
        """`judge.model`, or the first model that the server lists; a server is asked once in its life."""
        if self._section.model is not None:
            return self._section.model
        # No lock: callers that start together may all ask, which is cheaper than queueing behind a server that hangs.
        if self.url not in self._models:
            match await self._client.get("/models", cast_to=object):
                case {"data": [{"id": str(name)}, *_]}:
                    self._models[self.url] = name
                case listing:
                    raise UnusableReplyError(f"not a list of models: {str(listing)[:200]!r}")
        return self._models[self.url]
