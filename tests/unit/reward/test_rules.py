"""The reward table of the paper (C in {0, 1}) and of the released code (C in {-1, 0, 1})."""

import pytest

from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.reward.rules import consistency_value, format_reward, parse_response, result_reward
from megatron_r1reward.reward.terms import own_terms, reward_of


@pytest.mark.parametrize(
    ("result", "form", "by_consistency"),
    [
        (1.0, 1.0, {1.0: 2.0, 0.0: 1.5, -1.0: 1.0}),
        (1.0, 0.0, {1.0: 1.5, 0.0: 1.0, -1.0: 0.5}),
        (0.0, 1.0, {1.0: 0.5, 0.0: 0.5, -1.0: 0.5}),
        (0.0, 0.0, {1.0: 0.0, 0.0: 0.0, -1.0: 0.0}),
    ],
)
def test_reward_table(result: float, form: float, by_consistency: dict[float, float]) -> None:
    assert {c: reward_of(own_terms(form, result, c), RewardSection()) for c in by_consistency} == by_consistency


def test_weights() -> None:
    section = RewardSection(format_weight=0.1, consistency_weight=0.25)
    assert reward_of(own_terms(1.0, 1.0, 1.0), section) == pytest.approx(1.35)


@pytest.mark.parametrize(
    ("verdict", "paper", "released_code"),
    [("consistent", 1.0, 1.0), ("inconsistent", 0.0, -1.0), ("unknown", 0.0, 0.0), ("not_asked", 0.0, 0.0)],
)
def test_consistency_levels(verdict, paper: float, released_code: float) -> None:
    assert consistency_value(verdict, "paper") == paper
    assert consistency_value(verdict, "released_code") == released_code


def test_rules() -> None:
    right = parse_response("<think>a</think><answer>2</answer>")
    assert (format_reward(right), result_reward(right, 2), result_reward(right, 1)) == (1.0, 1.0, 0.0)
    unparsable = parse_response("the answer is 1")
    assert (format_reward(unparsable), result_reward(unparsable, 1)) == (0.0, 0.0)
