"""Voting@K and any-correct@K as exact expectations, not as one lucky draw of samples.

N samples of a judgement hold r right votes, w wrong votes and N - r - w abstentions (answers that do not parse).
Voting@k is the expected result of a majority vote among k of the N samples, over all k-subsets. By exchangeability
this needs only (r, w, N): the number of voters in a subset is hypergeometric, and so is the number of right votes
among the voters.

Rules: a tie counts 1/2 (a fair coin decides), an abstention does not vote, a subset without any vote is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_r1reward.types import Label

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Votes:
    """Votes on U judgements (one per pair and answer order), `samples` of each: right + wrong <= samples."""

    right: Counts  # int64 [U]
    wrong: Counts  # int64 [U]
    samples: int


def count_votes(choices: Sequence[Sequence[Label | None]], labels: Sequence[Label], samples: int) -> Votes:
    """Count the votes of U judgements.

    Args:
        choices: U rows of at most `samples` parsed answers; None abstains, and so does a missing sample.
        labels: the U right answers.
        samples: N, the number of samples that were asked for.

    Raises:
        ValueError: the lengths do not match, or a row has more than `samples` answers.
    """
    if len(choices) != len(labels):
        raise ValueError(f"{len(choices)} rows of choices for {len(labels)} labels: pass one row per label")
    longest = max((len(row) for row in choices), default=0)
    if longest > samples:
        raise ValueError(f"a row has {longest} choices but samples is {samples}: pass at most {samples} per row")
    right = [sum(choice == label for choice in row) for row, label in zip(choices, labels, strict=True)]
    votes = [sum(choice is not None for choice in row) for row in choices]
    return Votes(
        right=np.array(right, dtype=np.int64),
        wrong=np.array(votes, dtype=np.int64) - np.array(right, dtype=np.int64),
        samples=samples,
    )


def voting_accuracy(votes: Votes, k: int) -> Floats:
    """Expected accuracy of a majority vote among k of the samples, float64 [U] in [0, 1].

    `k = 1` is the accuracy of a single sample, where an answer that does not parse is wrong.

    Raises:
        ValueError: k is not in [1, samples].
    """
    from scipy.stats import hypergeom  # takes half a second: stages without an evaluation do without

    _check_k(k, votes.samples)
    voters = (votes.right + votes.wrong)[:, None]  # [U, 1]
    drawn = np.arange(1, k + 1)[None, :]  # [1, k]: how many of the k samples vote; none at all is wrong
    probability = hypergeom.pmf(drawn, votes.samples, voters, k)  # [U, k]
    # Where a subset cannot hold `drawn` voters its probability is 0; the clamps only keep the other factor defined.
    population, draws = np.maximum(voters, 1), np.minimum(drawn, voters)
    right = votes.right[:, None]
    majority = hypergeom.sf(drawn // 2, population, right, draws)
    tie = np.where(drawn % 2 == 0, hypergeom.pmf(drawn // 2, population, right, draws), 0.0)
    return np.asarray((probability * (majority + 0.5 * tie)).sum(axis=1), dtype=np.float64)


def any_correct(votes: Votes, k: int) -> Floats:
    """Probability that at least one of k of the samples is right, float64 [U].

    Nearly 1 for large k even for a coin (1 - 2^-k): a measure of diversity, not of ability.

    Raises:
        ValueError: k is not in [1, samples].
    """
    from scipy.stats import hypergeom

    _check_k(k, votes.samples)
    return np.asarray(hypergeom.sf(0, votes.samples, votes.right, k), dtype=np.float64)


def order_agreement(first: Votes, second: Votes) -> Floats:
    """Probability that the majority votes in the two answer orders pick the same response, float64 [P].

    Both arguments hold the same P pairs, one order each. Right in both orders or wrong in both orders is agreement.
    A tie is decided by a fair coin; without any vote there is no pick, hence no agreement.
    """
    first_right, first_wrong = _majority(first)
    second_right, second_wrong = _majority(second)
    return first_right * second_right + first_wrong * second_wrong


def _majority(votes: Votes) -> tuple[Floats, Floats]:
    """Probability that the vote of all samples is right, and that it is wrong: (1, 0), (0, 1), (1/2, 1/2), (0, 0)."""
    tie = 0.5 * ((votes.right == votes.wrong) & (votes.right > 0))
    return (votes.right > votes.wrong) + tie, (votes.wrong > votes.right) + tie


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"voting@{k} needs {k} samples but there are {samples}: choose k in [1, {samples}]")
