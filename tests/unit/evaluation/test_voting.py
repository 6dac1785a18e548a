from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from megatron_r1reward.evaluation.voting import Votes, any_correct, count_votes, order_agreement, voting_accuracy
from megatron_r1reward.types import Label

Choices = tuple[Label | None, ...]


def vote(subset: Choices, label: Label) -> float:
    right = sum(choice == label for choice in subset)
    wrong = sum(choice is not None for choice in subset) - right
    if right == wrong:
        return 0.5 if right else 0.0
    return float(right > wrong)


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 6])
def test_voting_and_any_correct_equal_the_mean_over_all_subsets(samples: int) -> None:
    rows: list[Choices] = list(product((1, 2, None), repeat=samples))
    label: Label = 1
    votes = count_votes(rows, [label] * len(rows), samples)
    for k in range(1, samples + 1):
        subsets = [list(combinations(row, k)) for row in rows]
        np.testing.assert_allclose(
            voting_accuracy(votes, k), [np.mean([vote(s, label) for s in row]) for row in subsets], atol=1e-12
        )
        np.testing.assert_allclose(
            any_correct(votes, k), [np.mean([label in s for s in row]) for row in subsets], atol=1e-12
        )


def test_one_sample_is_the_share_of_right_samples_and_unparsable_is_wrong() -> None:
    votes = count_votes([[2, 2, 1, None], [None] * 4], [2, 2], 4)
    np.testing.assert_allclose(voting_accuracy(votes, 1), [0.5, 0.0])


def test_a_missing_sample_counts_like_an_unparsable_one() -> None:
    short, full = count_votes([[1, 1]], [1], 5), count_votes([[1, 1, None, None, None]], [1], 5)
    np.testing.assert_allclose(voting_accuracy(short, 3), voting_accuracy(full, 3))


def test_voting_helps_a_good_judge_and_hurts_a_bad_one() -> None:
    good = Votes(right=np.array([10]), wrong=np.array([5]), samples=15)
    bad = Votes(right=good.wrong, wrong=good.right, samples=15)
    assert voting_accuracy(good, 1)[0] == pytest.approx(2 / 3)
    assert voting_accuracy(good, 1)[0] < voting_accuracy(good, 5)[0] < voting_accuracy(good, 15)[0] == 1.0
    assert voting_accuracy(bad, 15)[0] == 0.0


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_samples_is_refused(k: int) -> None:
    votes = count_votes([[1, 1, 2]], [1], 3)
    with pytest.raises(ValueError, match=rf"voting@{k} needs {k} samples but there are 3"):
        voting_accuracy(votes, k)
    with pytest.raises(ValueError, match="choose k in"):
        any_correct(votes, k)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows of choices for 1 labels"):
        count_votes([[1], [2]], [1], 1)
    with pytest.raises(ValueError, match="a row has 2 choices but samples is 1"):
        count_votes([[1, 2]], [1], 1)


def test_order_agreement_is_about_the_response_not_about_its_place() -> None:
    labels_first: list[Label] = [1, 1, 1, 1, 1]
    labels_second: list[Label] = [2, 2, 2, 2, 2]
    first = count_votes([[1, 1, 1], [2, 2, 1], [1, 1, 1], [1, 2, None], [None] * 3], labels_first, 3)
    second = count_votes([[2, 2, 1], [1, 1, 1], [1, 1, 1], [2, 2, 2], [2, 2, 2]], labels_second, 3)
    # right in both; wrong in both; always "Response 1"; tie against right; no vote at all
    np.testing.assert_allclose(order_agreement(first, second), [1.0, 1.0, 0.0, 0.5, 0.0])
