"""Group-relative rewards for callers that send one sample at a time: samples of one prompt wait for each other.

A pairwise model needs at least two responses to the same question. Samples are gathered by question and images; a
cohort is ranked when it has `size` samples, or `deadline_s` after its first one came, with those that are there. What
cannot be ranked (a sample that stays alone, one that the service refuses, a model that does not answer) is met by the
failure policy, counted (`/metrics`) and logged: "neutral" gives the reward of a draw, "raise" an error to the caller.
There is no silent constant. A refused sample keeps its place in the cohort and costs the others nothing. A scalar or
pointwise reward model needs no cohort: its buffer has `size` 1, and nothing waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_r1reward.serving import wire

log = logging.getLogger(__name__)
NEUTRAL = 0.5
Policy = Literal["neutral", "raise"]
Rank = Callable[[str, Sequence[str], Sequence[str]], Awaitable[Sequence[float]]]  # question, responses, images


class NoRewardError(RuntimeError):
    """This sample got no reward, and the policy is to say so."""


@dataclass(kw_only=True)
class _Cohort:
    question: str
    images: tuple[str, ...]
    responses: list[str] = field(default_factory=list)
    waiting: list[asyncio.Future[float]] = field(default_factory=list)
    refused: int = 0
    deadline: asyncio.TimerHandle | None = None


class CohortBuffer:
    """Belongs to one event loop.

    Args:
        rank: rewards of several responses, e.g. through the service's own ranking.
        limits: of what is taken.
        size: G, the samples that a trainer draws per prompt; 1: each has a reward of its own.
        deadline_s: how long the first sample of a cohort waits for the others.
    """

    def __init__(
        self, rank: Rank, *, limits: wire.Limits, size: int, deadline_s: float = 30.0, on_failure: Policy = "neutral"
    ) -> None:
        if size < 1 or deadline_s <= 0:
            raise ValueError(f"cohorts of {size} within {deadline_s:g} s: give a size of at least 1 and a time above 0")
        if on_failure not in get_args(Policy):
            raise ValueError(f"on_failure {on_failure!r}: give one of {', '.join(get_args(Policy))}")
        self._limits = limits
        self._rank, self._size, self._deadline_s, self._on_failure = rank, size, deadline_s, on_failure
        self._open: dict[tuple[str, tuple[str, ...]], _Cohort] = {}
        self._running: set[asyncio.Task[None]] = set()
        # samples, cohorts, incomplete (at the deadline); samples without a reward, by reason (alone, refused, failed),
        # and by what they got instead (neutral, raise)
        self.counts: Counter[str] = Counter()

    async def reward(self, question: str, response: str, images: Sequence[str] = ()) -> float:
        """The response's reward among its cohort.

        Raises:
            NoRewardError: there is none, and the policy is "raise".
            wire.RefusedError: likewise, because of what this sample is.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[float] = loop.create_future()
        self.counts["samples"] += 1
        try:
            wire.check_item(question, images, self._limits)
        except wire.RefusedError as error:
            self._without(future, error, "refused")
            return await future
        key = (question, tuple(images))
        cohort = self._open.get(key)
        if cohort is None:
            cohort = self._open[key] = _Cohort(question=question, images=tuple(images))
            cohort.deadline = loop.call_later(self._deadline_s, self._close, key, cohort)
        self._join(cohort, response, future)
        if len(cohort.responses) + cohort.refused == self._size:
            self._close(key, cohort)
        return await future

    async def group(self, question: str, responses: Sequence[str]) -> list[float]:
        """Rewards of a whole group that came together; raises as `reward`."""
        self.counts.update(samples=len(responses), cohorts=1)
        cohort = _Cohort(question=question, images=())
        futures: list[asyncio.Future[float]] = [asyncio.get_running_loop().create_future() for _ in responses]
        for response, future in zip(responses, futures, strict=True):
            self._join(cohort, response, future)
        await self._finish(cohort)
        return list(await asyncio.gather(*futures))

    def _join(self, cohort: _Cohort, response: str, future: asyncio.Future[float]) -> None:
        try:
            wire.check_texts([response], self._limits)
        except wire.RefusedError as error:
            cohort.refused += 1
            self._without(future, error, "refused")
            return
        cohort.responses.append(response)
        cohort.waiting.append(future)

    def _without(self, future: asyncio.Future[float], error: Exception, reason: str) -> None:
        """A sample without a reward is met by the policy."""
        self.counts[reason] += 1
        self.counts[self._on_failure] += 1
        log.warning("a sample without a reward (%s): %s", self._on_failure, error)
        if future.done():  # the caller has gone
            return
        if self._on_failure == "neutral":
            future.set_result(NEUTRAL)
        else:
            future.set_exception(error)

    def _close(self, key: tuple[str, tuple[str, ...]], cohort: _Cohort) -> None:
        """No more samples for this cohort; the next one of the same question begins another."""
        if self._open.get(key) is not cohort:
            return
        del self._open[key]
        assert cohort.deadline is not None
        cohort.deadline.cancel()
        self.counts["cohorts"] += 1
        self.counts["incomplete"] += len(cohort.responses) + cohort.refused < self._size
        task = asyncio.ensure_future(self._finish(cohort))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _finish(self, cohort: _Cohort) -> None:
        reason, error = "alone", "it is alone with its prompt, and a pairwise model needs another response"
        if len(cohort.responses) > 1 or (self._size == 1 and cohort.responses):
            # In the order of their texts, so that rewards do not depend on who came first.
            order = sorted(range(len(cohort.responses)), key=cohort.responses.__getitem__)
            try:
                ranked = await self._rank(cohort.question, [cohort.responses[i] for i in order], cohort.images)
            except (ValueError, RuntimeError) as problem:
                reason, error = "failed", str(problem)
            else:
                for place, reward in zip(order, ranked, strict=True):
                    if not cohort.waiting[place].done():
                        cohort.waiting[place].set_result(reward)
                return
        for future in cohort.waiting:
            self._without(future, NoRewardError(f"no reward: {error}"), reason)
