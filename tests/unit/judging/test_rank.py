from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from simulated_judge import SimulatedJudge

from megatron_r1reward.judging.ask import Item
from megatron_r1reward.judging.compare import Votes
from megatron_r1reward.judging.rank import SCHEDULES, Ranking, fit_strengths, rank

ITEM = Item(question="Which?")
NAMES = list("abcdefgh")
CLEAR = {name: 8.0 * place for place, name in enumerate(NAMES)}  # h is the best; nobody doubts it


def ranked(judge: SimulatedJudge, candidates: list[str] = NAMES, votes: Votes | None = None, **options) -> Ranking:
    return asyncio.run(rank(judge, ITEM, candidates, votes or Votes(), **options))


@pytest.mark.parametrize(
    ("schedule", "calls"), [("all_pairs", 56), ("swiss", 24), ("knockout", 14), ("circular", 16), ("pivot", 14)]
)
def test_what_a_schedule_costs_and_finds(schedule, calls) -> None:
    judge = SimulatedJudge(CLEAR)
    found = ranked(judge, schedule=schedule)
    assert found.calls == judge.calls == calls
    assert {found.ties, found.unparsable, found.cycles} == {0}
    if schedule == "all_pairs":
        assert found.order == tuple(range(7, -1, -1))
    if schedule in ("all_pairs", "swiss", "knockout"):
        assert found.best == 7
    assert sum(found.rewards) == pytest.approx(4.0)
    assert found.rewards[found.best] == max(found.rewards)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_odd_and_small_fields(schedule, size) -> None:
    found = ranked(SimulatedJudge(CLEAR), NAMES[:size], schedule=schedule)
    assert sorted(found.order) == list(range(size))
    assert math.isfinite(sum(found.strengths))
    assert 0.0 < found.confidence <= 1.0


def test_strengths_are_the_maximum_of_the_penalised_likelihood() -> None:
    wins = np.random.default_rng(0).integers(0, 4, (6, 6)) * 1.0
    np.fill_diagonal(wins, 0.0)

    def loss(strengths: np.ndarray) -> float:
        difference = strengths[:, None] - strengths[None, :]
        return float((wins * np.logaddexp(0, -difference)).sum() + (strengths**2).sum() / 8)

    from scipy.optimize import minimize

    best = minimize(loss, np.zeros(6), tol=1e-12).x
    strengths, covariance = fit_strengths(wins)
    np.testing.assert_allclose(strengths, best - best.mean(), atol=1e-4)
    hessian = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            chance = 1 / (1 + math.exp(strengths[j] - strengths[i]))
            weight = (wins[i, j] + wins[j, i]) * chance * (1 - chance)
            hessian[i, i] += weight
            hessian[i, j] -= weight
    np.testing.assert_allclose(covariance, np.linalg.inv(hessian + np.eye(6) / 4), rtol=1e-3, atol=1e-6)


def test_nothing_known_is_no_preference() -> None:
    found = ranked(SimulatedJudge(CLEAR, silence=1.0))
    assert set(found.rewards) == {0.5}
    assert found.unparsable == found.calls
    assert found.confidence == pytest.approx(1 / 8, abs=0.05)


def test_a_judge_with_a_taste_for_the_first_place_is_not_sure() -> None:
    """Both orders cancel the taste; one order believes it."""
    biased = SimulatedJudge(dict.fromkeys(NAMES, 0.0), place_bias=30.0)
    fair = ranked(biased, schedule="all_pairs")
    assert fair.ties == 28
    assert fair.rewards == pytest.approx([0.5] * 8)
    fooled = ranked(biased, votes=Votes(both_orders=False), schedule="all_pairs")
    assert fooled.best == 0


def test_equal_texts_are_one_candidate() -> None:
    judge = SimulatedJudge(CLEAR)
    found = ranked(judge, ["a", "h", "a", "h"], schedule="all_pairs")
    assert judge.calls == 2
    assert found.order == (1, 3, 0, 2)
    assert found.rewards[1] == found.rewards[3]
    alone = ranked(judge, ["a", "a"])
    assert (alone.calls, alone.rewards) == (0, (0.5, 0.5))


def test_cycles_are_counted() -> None:
    class Circle(SimulatedJudge):
        async def judge(self, item, responses, **asked):
            wins = {("a", "b"): 1, ("b", "c"): 1, ("a", "c"): 2}[responses]
            self.strengths = {responses[wins - 1]: 9.0, responses[2 - wins]: -9.0}
            return await super().judge(item, responses, **asked)

    found = ranked(Circle({}), ["a", "b", "c"], schedule="all_pairs")
    assert found.cycles == 1
    assert found.rewards == pytest.approx([0.5] * 3, abs=1e-3)


def test_a_budget_is_kept() -> None:
    for budget in (2, 9, 24, 1000):
        judge = SimulatedJudge(CLEAR)
        assert ranked(judge, budget=budget).calls == judge.calls <= budget
    with pytest.raises(ValueError, match="budget 1 does not pay for one comparison, which costs up to 2"):
        ranked(SimulatedJudge(CLEAR), budget=1)
    with pytest.raises(ValueError, match="needs at least two"):
        ranked(SimulatedJudge(CLEAR), ["a"])


def test_the_same_seed_ranks_the_same() -> None:
    noisy = {name: 0.5 * place for place, name in enumerate(NAMES)}
    first, again = (ranked(SimulatedJudge(noisy), votes=Votes(samples=3), seed=4) for _ in range(2))
    assert (first.rewards, first.confidence) == (again.rewards, again.confidence)
    assert ranked(SimulatedJudge(noisy), votes=Votes(samples=3), seed=5).strengths != first.strengths
