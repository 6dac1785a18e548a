"""Rollouts in, scored rollouts out."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from megatron_r1reward.config.rl_sections import Truncated
from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.monitor.timers import BusyClock
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.reward.consistency import ConsistencyJudge, JudgeBatch
from megatron_r1reward.reward.rules import (
    combine,
    consistency_value,
    format_reward,
    parse_rollout,
    result_reward,
)
from megatron_r1reward.types import JudgeVerdict, Label, Rollout, ScoredRollout

_Case = tuple[str, Label]  # a reasoning, and the answer that it should support
_JUDGE_COUNTS = ("cached", "over_budget", "not_tried", "steps_without")


class RewardScorer:
    """Scores rollouts with R = 0.5 F + A (1 + 0.5 C): the rules at once, the judge only where the result is right.

    With `section.use_judge = false` no judge is asked: every verdict is "not_asked" and C = 0.

    Raises:
        ValueError: `use_judge` is set and `judge` is None.
    """

    def __init__(self, section: RewardSection, judge: ConsistencyJudge | None) -> None:
        if section.use_judge and judge is None:
            raise ValueError("reward.use_judge is true, but there is no judge: configure [judge], or set it to false")
        self._section = section
        self._judge = judge if section.use_judge else None
        self._loop: EventLoopThread | None = (
            None  # of all batches under way: they share connections' limits and breaker
        )
        self._batches = 0
        self._lock = threading.Lock()  # of the two above

    @property
    def clocks(self) -> dict[str, BusyClock]:
        """Of the judge's servers, by name; those that have been asked already."""
        clocks = {} if self._judge is None else self._judge.clocks
        return {f"judge-{number}": clock for number, clock in enumerate(clocks.values())}

    def score(self, rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], dict[str, int]]:
        """All rollouts of a batch at once; see `ScoringBatch.finish`."""
        with self.begin() as batch:
            return batch.finish(rollouts)

    @contextmanager
    def begin(self) -> Iterator[ScoringBatch]:
        """A batch that is scored as its rollouts come; what it still asks at the end of the block is given up."""
        if self._judge is None:
            yield ScoringBatch(self._section)
            return
        judge_batch = JudgeBatch(self._judge)
        with self._lock:
            self._batches += 1
            self._loop = loop = self._loop or EventLoopThread("judge-calls")
        try:
            loop.run(judge_batch.__aenter__())
            yield ScoringBatch(self._section, judge=judge_batch, loop=loop)
        finally:
            loop.run(judge_batch.aclose())
            with self._lock:
                self._batches -= 1
                if self._batches == 0:
                    self._loop = None
                    loop.close()


class ScoringBatch:
    """The rollouts of one step, in slots (prompts) that may be filled in any order, from any thread.

    The judge is asked about a slot's right answers when the slot is filled. Where only so many questions may be asked
    per step it must be the first ones: then a slot waits until all before it are filled.
    """

    def __init__(
        self, section: RewardSection, *, judge: JudgeBatch | None = None, loop: EventLoopThread | None = None
    ) -> None:
        self._section, self._judge, self._loop = section, judge, loop
        self._held: dict[int, list[_Case]] = {}
        self._next = 0  # the first slot that is not filled
        self._lock = threading.Lock()

    def add(self, slot: int, rollouts: Sequence[Rollout]) -> None:
        """Slot `slot` is filled, with nothing if its prompt failed. Returns at once."""
        if self._judge is None or self._loop is None:
            return
        with self._lock:
            self._held[slot] = [
                case for rollout in rollouts if (case := _question_of(rollout, self._section.truncated)) is not None
            ]
            if not self._judge.counts_questions:
                ready = self._held.pop(slot)
            else:
                ready = []
                while self._next in self._held:
                    ready += self._held.pop(self._next)
                    self._next += 1
            if ready:  # within the lock: questions are asked in this order
                self._loop.submit(_ask(self._judge, ready))

    def finish(self, rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], dict[str, int]]:
        """Scored rollouts in the given order, which is that of the slots, and counts over them. Waits for the judge.

        Counts: `judge_asked`, `judge_consistent`, `judge_inconsistent`, `judge_unknown`, `unparsable` (no answer that
        is exactly 1 or 2), `truncated` (cut off by the token limit), `masked`, `special_tokens` and `answer_1` (a drift
        away from half of the rollouts means position bias); of the judge also `judge_cached` (questions it need not be
        asked), `judge_over_budget` and `judge_not_tried` (unknown for these reasons), and `judge_steps_without`
        (batches in a row without any verdict).

        Raises:
            JudgeDownError: the judge has been silent for too long.
        """
        verdicts: Mapping[int, JudgeVerdict] = {}
        if self._judge is not None and self._loop is not None:
            cases = {
                i: case
                for i, rollout in enumerate(rollouts)
                if (case := _question_of(rollout, self._section.truncated)) is not None
            }
            given = self._loop.run(self._judge.verdicts(list(cases.values())))
            verdicts = dict(zip(cases, given, strict=True))
        scored = [self._scored(rollout, verdicts.get(i, "not_asked")) for i, rollout in enumerate(rollouts)]
        judge = self._judge.counts if self._judge is not None else Counter[str]()
        return scored, count(scored) | {f"judge_{name}": judge[name] for name in _JUDGE_COUNTS}

    def _scored(self, rollout: Rollout, verdict: JudgeVerdict) -> ScoredRollout:
        parsed = parse_rollout(rollout, self._section.truncated)
        formatted = format_reward(parsed)
        result = result_reward(parsed, rollout.prompt.label)
        consistency = consistency_value(verdict, self._section.consistency_levels)
        return ScoredRollout(
            rollout=rollout,
            format_reward=formatted,
            result_reward=result,
            consistency_reward=consistency,
            reward=combine(formatted, result, consistency, self._section),
            predicted=parsed.answer,
            verdict=verdict,
            masked=self._section.truncated == "mask" and rollout.finish_reason == "length",
        )


def _question_of(rollout: Rollout, truncated: Truncated) -> _Case | None:
    """What the judge is asked about a right answer."""
    parsed = parse_rollout(rollout, truncated)
    return (parsed.reasoning, rollout.prompt.label) if parsed.answer == rollout.prompt.label else None


async def _ask(judge: JudgeBatch, cases: Sequence[_Case]) -> None:
    judge.ask(cases)


def count(scored: Sequence[ScoredRollout]) -> dict[str, int]:
    """Those of the counts of `RewardScorer.score` that follow from the scored rollouts alone."""
    verdicts = Counter(s.verdict for s in scored)
    return {
        "judge_asked": len(scored) - verdicts["not_asked"],
        "judge_consistent": verdicts["consistent"],
        "judge_inconsistent": verdicts["inconsistent"],
        "judge_unknown": verdicts["unknown"],
        "unparsable": sum(s.predicted is None for s in scored),
        "truncated": sum(s.rollout.finish_reason == "length" for s in scored),
        "special_tokens": sum(s.rollout.special_tokens for s in scored),
        "masked": sum(s.masked for s in scored),
        "answer_1": sum(s.predicted == 1 for s in scored),
    }
