"""Ways to vote are replayed on scripted judgements, so that what each must find and spend is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_r1reward.evaluation.calibration import calibration
from megatron_r1reward.evaluation.result import JudgedSamples, VotingPoint
from megatron_r1reward.evaluation.vote_budget import measure_votes, replay
from megatron_r1reward.judging.ask import ORDERS, Judgement, Order
from megatron_r1reward.judging.votes import Adaptive
from megatron_r1reward.types import Label

K, TOKENS = 15, 10
Pair = dict[Order, list[Judgement]]


def judged(order: Order, choices: list[Label | None]) -> list[Judgement]:
    return [
        Judgement(order=order, choice=one, p_first=None, text="", reasoning="", tokens=TOKENS, finish_reason="stop")
        for one in choices
    ]


def pair(first: list[Label | None], second: list[Label | None]) -> Pair:
    return {"12": judged("12", first), "21": judged("21", second)}


SURE = pair([1] * K, [1] * K)
WRONG = pair([2] * K, [2] * K)
ONE_PLACE = pair([1] * K, [2] * K)  # the model always prefers the first place
SILENT = pair([None] * K, [None] * K)


def test_a_sure_pair_costs_two_judgements_and_a_doubtful_one_the_budget() -> None:
    found = replay([SURE, WRONG, ONE_PLACE, SILENT], Adaptive(), 0)
    assert found.accuracy.tolist() == [1.0, 0.0, 0.5, 0.0]
    assert found.samples.tolist() == [2, 2, 16, 16]
    assert found.tokens.tolist() == [20, 20, 160, 160]
    assert np.isnan(found.p_right).sum() == np.isnan(found.p_right[-1]).sum() == 5


def test_votes_in_both_orders_spend_as_many_of_each() -> None:
    found = replay([SURE, ONE_PLACE, pair([1] * 2, [2])], 3, 0)
    assert found.samples.tolist() == [6, 6, 3]
    assert found.accuracy.tolist() == [1.0, 0.5, 1.0]  # two votes outweigh one: shares are smoothed


@pytest.mark.slow
def test_adaptive_voting_keeps_the_accuracy_of_the_majority_at_a_fraction_of_its_tokens() -> None:
    generator = np.random.default_rng(0)
    skills = generator.choice([0.95, 0.6], size=200, p=[0.8, 0.2])
    pairs = [
        {order: judged(order, [1 if hit else 2 for hit in generator.random(K) < skill]) for order in ORDERS}
        for skill in skills
    ]
    budget = measure_votes(pairs, list(range(200)), voting={15: (0.96, (0.93, 0.98))}, samples=K, seed=0)
    most, adaptive = _point(budget.points, "one order"), _point(budget.points, "adaptive", "0.9")
    assert most.tokens == 15 * TOKENS
    assert adaptive.accuracy > 0.9
    assert adaptive.tokens < most.tokens / 2
    assert budget.cheapest is not None and budget.cheapest.accuracy >= 0.93
    cheaper = [one for one in budget.points if one.method != "one order" and one.tokens < budget.cheapest.tokens]
    assert all(one.accuracy < 0.93 for one in cheaper)


def test_a_model_that_no_votes_bring_to_the_majority_has_no_cheapest_way() -> None:
    budget = measure_votes([WRONG] * 20, list(range(20)), voting={15: (0.9, (0.8, 0.95))}, samples=K, seed=0)
    assert budget.cheapest is None
    assert budget.calibration_error is not None and budget.calibration_error > 0.7  # sure and always wrong


def test_votes_that_the_judge_does_not_find_supported_are_left_out_and_an_order_without_others_is_counted() -> None:
    """Three of five votes are wrong; the judge sees through all of them, or through every vote of one order."""
    votes = pair([1, 1, 2, 2, 2], [1, 1, 2, 2, 2])
    seen = {order: [replace(one, consistent=one.choice == 1) for one in votes[order]] for order in ORDERS}
    lost = {"12": [replace(one, consistent=False) for one in votes["12"]], "21": seen["21"]}
    assert replay([votes], 5, 0).accuracy.tolist() == [0.0]
    found = replay([seen, lost], 5, 0, filtered=True)
    assert found.accuracy[0] == 1.0
    assert found.fallbacks.tolist() == [0.0, 1.0]
    assert found.tokens.tolist() == [2 * 5 * TOKENS] * 2, "the model has made the votes that are left out, too"
    counts = JudgedSamples(judge="j", consistent=4, inconsistent=6, unknown=0)
    budget = measure_votes(
        [seen] * 20, list(range(20)), voting={5: (0.0, (0.0, 0.1))}, samples=5, seed=0, judged=counts
    )
    assert _point(budget.points, "both orders, judge-filtered", "5 + 5").accuracy == 1.0
    assert budget.cheapest is not None and budget.cheapest.method != "both orders, judge-filtered"
    without = measure_votes([seen] * 20, list(range(20)), voting={}, samples=5, seed=0, judged="nobody asked")
    assert "both orders, judge-filtered" not in {one.method for one in without.points}
    assert (without.judged, without.not_judged) == (None, "nobody asked")


def test_a_pool_that_says_nothing_readable_has_no_calibration() -> None:
    budget = measure_votes([SILENT] * 3, list(range(3)), voting={}, samples=K, seed=0)
    assert (budget.calibration_error, budget.calibration, budget.cheapest) == (None, (), None)


def test_calibration_error_is_the_gap_of_confidence_and_accuracy() -> None:
    """Eight verdicts at 0.9, of which six are right, and two ties: 0.8 * |0.9 - 0.75| + 0.2 * |0.5 - 0.5|."""
    error, bins = calibration(np.array([0.9] * 6 + [0.1] * 2 + [0.5] * 2 + [np.nan]))
    assert error == pytest.approx(0.8 * 0.15)
    assert [(one.confidence, one.accuracy, one.share) for one in bins] == [
        pytest.approx((0.5, 0.5, 0.2)),
        pytest.approx((0.9, 0.75, 0.8)),
    ]


def _point(points: tuple[VotingPoint, ...], method: str, setting: str | None = None) -> VotingPoint:
    return next(one for one in points if one.method == method and setting in (None, one.setting))
