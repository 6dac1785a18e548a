"""Rollouts in, scored rollouts out."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from megatron_r1reward.config.rl_sections import AGREEMENT
from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.monitor.timers import BusyClock
from megatron_r1reward.network.event_loop import EventLoopThread
from megatron_r1reward.reward.consistency import ConsistencyJudge, JudgeBatch
from megatron_r1reward.reward.readers import Reader
from megatron_r1reward.reward.rules import (
    ParsedResponse,
    as_rating,
    consistency_value,
    format_reward,
    is_right,
    parse_rollout,
    result_reward,
)
from megatron_r1reward.reward.terms import TermFunctions, agreements, orderings, own_terms, reward_of, term_input
from megatron_r1reward.types import JudgeVerdict, Label, Preference, Rollout, ScoredRollout

log = logging.getLogger(__name__)
_Case = tuple[str, Label]  # a reasoning, and the answer that it should support
_JUDGE_COUNTS = ("cached", "over_budget", "not_tried", "steps_without")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What rewards follow from besides a judge's verdicts.

    Attributes:
        read: how answers are read; None: by the strict rule.
        rows: the rows that prompts are made of, by id, for functions of the user's.
        pointwise: prompts ask for the rating of one response.
    """

    section: RewardSection
    read: Reader | None = None
    pointwise: bool = False
    functions: TermFunctions = field(default_factory=TermFunctions)
    rows: Mapping[str, Preference] = field(default_factory=dict)

    def parse(self, rollout: Rollout) -> ParsedResponse:
        parsed = parse_rollout(rollout, self.section.truncated, self.read)
        return as_rating(parsed) if self.pointwise else replace(parsed, rating=None)

    def results(
        self, rollouts: Sequence[Rollout], parsed: Sequence[ParsedResponse], left_out: Sequence[bool]
    ) -> list[float | None]:
        """A of each; of ratings see `orderings`. None: the prompt of the other response has no samples."""
        prompts = [rollout.prompt for rollout in rollouts]
        if self.pointwise:
            return orderings(prompts, [one.rating for one in parsed], left_out)
        return [result_reward(one, prompt.label) for one, prompt in zip(parsed, prompts, strict=True)]

    def question_of(self, rollout: Rollout) -> _Case | None:
        """What the judge is asked about a right answer."""
        parsed, label = self.parse(rollout), rollout.prompt.label
        return (parsed.reasoning, label) if label is not None and is_right(parsed.answer, label) else None


class RewardScorer:
    """Scores rollouts, by default with R = 0.5 F + A (1 + 0.5 C): the rules at once, the judge only where the result is
    right. Terms that compare responses with each other (`reward.terms`) wait for all of a step.

    With `section.use_judge = false` no judge is asked: every verdict is "not_asked" and C = 0.

    Args:
        read: how answers are read; None: by the strict rule.
        pointwise: prompts ask for the rating of one response; A is then of `orderings`.

    Raises:
        ValueError: `use_judge` is set and `judge` is None, or a function of `section.terms` cannot be loaded.
    """

    def __init__(
        self,
        section: RewardSection,
        judge: ConsistencyJudge | None,
        *,
        read: Reader | None = None,
        pointwise: bool = False,
    ) -> None:
        if section.use_judge and judge is None:
            raise ValueError("reward.use_judge is true, but there is no judge: configure [judge], or set it to false")
        self.rules = Rules(section=section, read=read, functions=TermFunctions.load(section), pointwise=pointwise)
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

    def show(self, rows: Sequence[Preference]) -> None:
        """Functions of the user's see the texts of these rows from now on."""
        self.rules = replace(self.rules, rows={row.id: row for row in rows})

    def score(self, rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], dict[str, int]]:
        """All rollouts of a batch at once; see `ScoringBatch.finish`."""
        with self.begin() as batch:
            return batch.finish(rollouts)

    @contextmanager
    def begin(self) -> Iterator[ScoringBatch]:
        """A batch that is scored as its rollouts come; what it still asks at the end of the block is given up."""
        if self._judge is None:
            yield ScoringBatch(self.rules)
            return
        judge_batch = JudgeBatch(self._judge)
        with self._lock:
            self._batches += 1
            self._loop = loop = self._loop or EventLoopThread("judge-calls")
        try:
            loop.run(judge_batch.__aenter__())
            yield ScoringBatch(self.rules, judge=judge_batch, loop=loop)
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

    def __init__(self, rules: Rules, *, judge: JudgeBatch | None = None, loop: EventLoopThread | None = None) -> None:
        self._rules, self._judge, self._loop = rules, judge, loop
        self._held: dict[int, list[_Case]] = {}
        self._next = 0  # the first slot that is not filled
        self._lock = threading.Lock()

    def add(self, slot: int, rollouts: Sequence[Rollout]) -> None:
        """Slot `slot` is filled, with nothing if its prompt failed. Returns at once."""
        if self._judge is None or self._loop is None:
            return
        with self._lock:
            self._held[slot] = [case for rollout in rollouts if (case := self._rules.question_of(rollout)) is not None]
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
        is exactly 1 or 2, or no rating), `truncated` (cut off by the token limit), `masked`, `special_tokens`,
        `answer_1` (a drift away from half of the rollouts means position bias) and `unlabelled` (of pairs without a
        label); of the judge also `judge_cached` (questions it need not be asked), `judge_over_budget` and
        `judge_not_tried` (unknown for these reasons), and `judge_steps_without` (batches in a row without any verdict).

        Raises:
            JudgeDownError: the judge has been silent for too long.
            PartError: a function of the user's failed.
        """
        verdicts: Mapping[int, JudgeVerdict] = {}
        if self._judge is not None and self._loop is not None:
            cases = {
                i: case for i, rollout in enumerate(rollouts) if (case := self._rules.question_of(rollout)) is not None
            }
            given = self._loop.run(self._judge.verdicts(list(cases.values())))
            verdicts = dict(zip(cases, given, strict=True))
        scored = _scored(self._rules, rollouts, [verdicts.get(i, "not_asked") for i in range(len(rollouts))])
        judge = self._judge.counts if self._judge is not None else Counter[str]()
        return scored, count(scored) | {f"judge_{name}": judge[name] for name in _JUDGE_COUNTS}


def _scored(rules: Rules, rollouts: Sequence[Rollout], verdicts: Sequence[JudgeVerdict]) -> list[ScoredRollout]:
    section = rules.section
    parsed = [rules.parse(rollout) for rollout in rollouts]
    masked = [section.truncated == "mask" and rollout.finish_reason == "length" for rollout in rollouts]
    results = rules.results(rollouts, parsed, masked)
    others, alone = _further_terms(rules, rollouts, parsed, verdicts, masked)
    alone = [apart or result is None for apart, result in zip(alone, results, strict=True)]
    if any(alone):
        log.warning("%d responses have none of the pair's other prompt to compare with: they train nothing", sum(alone))
    found = []
    for place, (rollout, one, verdict) in enumerate(zip(rollouts, parsed, verdicts, strict=True)):
        form, result = format_reward(one), results[place] or 0.0
        consistency = consistency_value(verdict, section.consistency_levels)
        terms = {name: values[place] for name, values in others.items()}
        item = ScoredRollout(
            rollout=rollout,
            format_reward=form,
            result_reward=result,
            consistency_reward=consistency,
            reward=reward_of(own_terms(form, result, consistency) | terms, section),
            predicted=one.answer,
            verdict=verdict,
            terms=terms,
            masked=masked[place] or alone[place],
            rating=one.rating,
        )
        found.append(item)
    return found


def _further_terms(
    rules: Rules,
    rollouts: Sequence[Rollout],
    parsed: Sequence[ParsedResponse],
    verdicts: Sequence[JudgeVerdict],
    masked: Sequence[bool],
) -> tuple[dict[str, list[float]], list[bool]]:
    """Values of the terms that are not the rules' own, by name; and which rollouts have nobody to agree with, because
    the prompt of the other order failed: they cannot earn what others can."""
    agreed: list[float | None] = [None] * len(rollouts)
    alone = [False] * len(rollouts)
    terms: dict[str, list[float]] = {}
    if rules.section.rewards_agreement:
        agreed = agreements([one.prompt for one in rollouts], [one.answer for one in parsed], masked)
        alone = [share is None for share in agreed]
        terms[AGREEMENT] = [share or 0.0 for share in agreed]
    if rules.functions.functions:
        rows = [
            term_input(one, said, verdict=verdict, agreement=share, preference=rules.rows.get(one.prompt.preference_id))
            for one, said, verdict, share in zip(rollouts, parsed, verdicts, agreed, strict=True)
        ]
        terms |= rules.functions.values(rows)
    return terms, alone


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
        "unparsable": sum(s.predicted is None and s.rating is None for s in scored),
        "truncated": sum(s.rollout.finish_reason == "length" for s in scored),
        "special_tokens": sum(s.rollout.special_tokens for s in scored),
        "masked": sum(s.masked for s in scored),
        "answer_1": sum(s.predicted == 1 for s in scored),
        "unlabelled": sum(s.rollout.prompt.label is None for s in scored),
    }
