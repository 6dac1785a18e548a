"""Rollouts in, scored rollouts out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.reward.consistency import ConsistencyJudge
from megatron_r1reward.reward.rules import (
    ParsedResponse,
    combine,
    consistency_value,
    format_reward,
    parse_response,
    result_reward,
)
from megatron_r1reward.types import JudgeVerdict, Label, Rollout, ScoredRollout

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

    def score(self, rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], dict[str, int]]:
        """`score_async` for callers without an event loop."""
        return asyncio.run(self.score_async(rollouts))

    async def score_async(self, rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], dict[str, int]]:
        """Scored rollouts in the given order, and counts over them.

        Counts: `judge_asked`, `judge_consistent`, `judge_inconsistent`, `judge_unknown`, `unparsable` (no answer that
        is exactly 1 or 2) and `answer_1` (a drift away from half of the rollouts means position bias); of the judge
        also `judge_cached` (questions it need not be asked), `judge_over_budget` and `judge_not_tried` (unknown for
        these reasons), and `judge_steps_without` (batches in a row without any verdict).

        Raises:
            JudgeDownError: the judge has been silent for too long.
        """
        parsed = [parse_response(rollout.text) for rollout in rollouts]
        right = [i for i, rollout in enumerate(rollouts) if parsed[i].answer == rollout.prompt.label]
        cases = [(parsed[i].reasoning, rollouts[i].prompt.label) for i in right]
        verdicts = dict(zip(right, await self._verdicts(cases), strict=True))
        scored = [self._scored(rollouts[i], parsed[i], verdicts.get(i, "not_asked")) for i in range(len(rollouts))]
        judge = self._judge.counts if self._judge is not None else Counter[str]()
        return scored, count(scored) | {f"judge_{name}": judge[name] for name in _JUDGE_COUNTS}

    async def _verdicts(self, cases: Sequence[tuple[str, Label]]) -> Sequence[JudgeVerdict]:
        if self._judge is None:
            return ["not_asked"] * len(cases)
        return await self._judge.judge_many(cases)

    def _scored(self, rollout: Rollout, parsed: ParsedResponse, verdict: JudgeVerdict) -> ScoredRollout:
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
        )


def count(scored: Sequence[ScoredRollout]) -> dict[str, int]:
    """Those of the counts of `RewardScorer.score` that follow from the scored rollouts alone."""
    verdicts = Counter(s.verdict for s in scored)
    return {
        "judge_asked": len(scored) - verdicts["not_asked"],
        "judge_consistent": verdicts["consistent"],
        "judge_inconsistent": verdicts["inconsistent"],
        "judge_unknown": verdicts["unknown"],
        "unparsable": sum(s.predicted is None for s in scored),
        "answer_1": sum(s.predicted == 1 for s in scored),
    }
