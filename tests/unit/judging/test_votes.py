from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from simulated_judge import SimulatedJudge

from megatron_r1reward.judging.ask import Item, Judgement, Order
from megatron_r1reward.judging.compare import Votes, compare
from megatron_r1reward.judging.votes import Adaptive, count, orders_agree, probability, supported, verdict

ITEM = Item(question="Which?")


def said(order: Order, choice: int | None, p_first: float | None = None) -> Judgement:
    return Judgement(
        order=order, choice=choice, p_first=p_first, text="", reasoning=f"{choice}", tokens=1, finish_reason="stop"
    )


def test_a_model_that_always_says_1_decides_nothing() -> None:
    """Its first place wins in either order: response 1 in order 12, response 2 in order 21."""
    judgements = [said("12", 1)] * 9 + [said("21", 2)] * 3
    assert probability(judgements, "majority") == pytest.approx((9 + 0.5) / 13)
    assert probability(judgements, "balanced") == pytest.approx((9.5 / 10 + 0.5 / 4) / 2)
    even = [said("12", 1)] * 4 + [said("21", 2)] * 4
    assert probability(even, "balanced") == 0.5
    assert verdict(0.5) is None
    assert orders_agree(even) is False


def test_what_is_not_said_is_not_a_vote() -> None:
    judgements = [said("12", None), said("12", 2), said("21", None)]
    assert count(judgements).unparsable == 2
    assert probability(judgements, "majority") == pytest.approx(0.25)
    assert probability(judgements, "balanced") == pytest.approx(0.25)
    assert orders_agree(judgements) is None
    assert probability([said("12", None)], "log_prob") is None
    assert verdict(None) is None


def test_votes_that_their_reasoning_does_not_support_are_left_out_where_others_are_left() -> None:
    def judged(order: Order, choice: int | None, consistent: bool | None) -> Judgement:
        return replace(said(order, choice), consistent=consistent)

    votes = [judged("12", 1, True), judged("12", 2, False), judged("21", 1, None), judged("21", 2, False)]
    kept, fallbacks = supported(votes)
    assert ([item.choice for item in kept], fallbacks) == ([1, 1], 0)  # what the judge does not know counts
    kept, fallbacks = supported([judged("12", 1, True), judged("21", 2, False), judged("21", None, None)])
    assert ([item.order for item in kept], fallbacks) == (["12", "21"], 1)
    assert verdict(probability(kept, "balanced")) is None, "one order alone must not decide"


def test_soft_votes_are_the_answer_tokens_probability() -> None:
    judgements = [said("12", 1, 0.6), said("21", 1, 0.9), said("21", 1)]
    expected = ((0.6 + 0.5) / 2 + (0.9 + 1 + 0.5) / 3) / 2
    assert probability(judgements, "log_prob") == pytest.approx(expected)


def test_greedy_is_for_a_single_sample() -> None:
    assert Votes().sampling_temperature == 0.0
    assert Votes(samples=5).sampling_temperature == 1.0
    assert Votes(adaptive=Adaptive()).sampling_temperature == 1.0
    assert Votes(samples=5, temperature=0.7).sampling_temperature == 0.7
    for bad in ({"samples": 0}, {"adaptive": Adaptive(), "both_orders": False}):
        with pytest.raises(ValueError):
            Votes(**bad)


def test_adaptive_sampling_asks_more_where_it_is_not_sure() -> None:
    votes = Votes(adaptive=Adaptive(max_samples=16))
    sure = SimulatedJudge({"good": 9.0, "bad": -9.0})
    done = asyncio.run(compare(sure, ITEM, ("bad", "good"), votes))
    assert (done.verdict, len(done.judgements), done.orders_agree) == (2, 2, True)
    torn = SimulatedJudge({"a": 0.0, "b": 0.0}, place_bias=50.0)
    done = asyncio.run(compare(torn, ITEM, ("a", "b"), votes))
    assert (done.verdict, len(done.judgements), done.orders_agree) == (None, 16, False)


def test_adaptive_sampling_is_right_about_how_sure_it_is() -> None:
    """Of decided comparisons the share that picks the truly better side is at least the confidence that was asked."""
    judge = SimulatedJudge({"a": 1.5, "b": 0.0})
    votes = Votes(adaptive=Adaptive(confidence=0.9, max_samples=40), aggregator="majority")
    done = [asyncio.run(compare(judge, Item(question=str(i)), ("a", "b"), votes, seed=i)) for i in range(200)]
    assert sum(item.verdict == 1 for item in done) / 200 >= 0.9


def test_the_reasoning_belongs_to_the_verdict() -> None:
    from megatron_r1reward.judging.compare import summarise

    assert summarise([said("12", 2), said("12", 1), said("21", 1)], "majority").reasoning == "1"
    assert summarise([said("12", None)], "majority").reasoning == "None"
