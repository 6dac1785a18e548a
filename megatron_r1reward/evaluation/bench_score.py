"""What one stored set of judgements says about each category of a benchmark: greedy and sampled, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_r1reward.evaluation.benchmark_rules import (
    BothOrdersScore,
    Row,
    Rule,
    both_orders_score,
    group_name,
    items_of,
)
from megatron_r1reward.evaluation.judgements import Judged
from megatron_r1reward.evaluation.result import JudgedSamples, VoteBudget
from megatron_r1reward.evaluation.statistics import Estimate, estimate_share
from megatron_r1reward.evaluation.vote_budget import measure_votes
from megatron_r1reward.evaluation.voting import Votes, any_correct, voting_accuracy
from megatron_r1reward.judging.ask import ORDERS, Order
from megatron_r1reward.types import Preference

_K = (1, 3, 5, 7, 9, 15)  # of VL-RewardBench's own scripts, and of the R1-Reward paper


@dataclass(frozen=True, kw_only=True)
class CategoryScore:
    """Of all pairs of a category, unusable ones included: those are never right.

    `voting` and `any_correct`: k -> the mean of both orders; empty without samples.
    """

    pairs: int
    greedy: BothOrdersScore
    voting: Mapping[int, Estimate]
    any_correct: Mapping[int, Estimate]


def right_where_better_is(
    judged: Judged, preferences: Mapping[int, Preference], rows: int, *, second: bool
) -> list[bool | None]:
    """Greedy verdicts of `rows` rows with the better response shown first, or `second`; None: there is none."""
    found: list[bool | None] = []
    for place in range(rows):
        order = None if place not in preferences else _order_of(preferences[place], second=second)
        line = None if order is None else judged.greedy.get((place, order))
        found.append(None if line is None else line["right"])
    return found


def score_categories(
    rule: Rule, rows: Sequence[Row], judged: Judged, preferences: Mapping[int, Preference], samples: int
) -> tuple[CategoryScore, dict[str, CategoryScore]]:
    """The score of all rows, and of each category of the benchmark's own grouping."""
    first, second = (right_where_better_is(judged, preferences, len(rows), second=flip) for flip in (False, True))
    votes = {order: _votes(judged, order, len(rows), samples) for order in ORDERS}
    ks = sorted({k for k in (*_K, samples) if 1 <= k <= samples})
    means = {
        "voting": {k: np.mean([voting_accuracy(votes[order], k) for order in ORDERS], axis=0) for k in ks},
        "any_correct": {k: np.mean([any_correct(votes[order], k) for order in ORDERS], axis=0) for k in ks},
    }
    items = items_of(rows)

    def score(places: Sequence[int]) -> CategoryScore:
        part = [items[place] for place in places]
        estimates = {
            name: {k: estimate_share(values[list(places)], part) for k, values in by_k.items()}
            for name, by_k in means.items()
        }
        return CategoryScore(
            pairs=len(places),
            greedy=both_orders_score(
                [rows[place] for place in places],
                [first[place] for place in places],
                [second[place] for place in places],
            ),
            **estimates,
        )

    members: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        members.setdefault(group_name(rule.group, row), []).append(place)
    return score(range(len(rows))), {name: score(places) for name, places in sorted(members.items())}


def vote_curves(
    rows: Sequence[Row],
    judged: Judged,
    overall: CategoryScore,
    samples: int,
    seed: int,
    supported: JudgedSamples | str,
) -> VoteBudget:
    """Accuracy against generated tokens, replayed on the samples. `supported`: see `measure_votes`."""
    pairs = [{order: judged.judgements(place, order) for order in ORDERS} for place in range(len(rows))]
    voting = {k: (estimate.mean, estimate.interval) for k, estimate in overall.voting.items()}
    return measure_votes(pairs, items_of(rows), voting=voting, samples=samples, seed=seed, judged=supported)


def _votes(judged: Judged, order: Order, rows: int, samples: int) -> Votes:
    lines = [judged.samples.get((place, order), ()) for place in range(rows)]
    right, wrong = (
        np.array([sum(line["right"] is wanted for line in part) for part in lines], dtype=np.int64)
        for wanted in (True, False)
    )
    return Votes(right=right, wrong=wrong, samples=samples)


def _order_of(preference: Preference, *, second: bool) -> Order:
    """In which order the better response is shown first, or second."""
    return ORDERS[(preference.label == 2) ^ second]
