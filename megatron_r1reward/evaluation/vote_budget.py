"""What votes are worth: accuracy against generated tokens, and calibration, replayed on one stored set of samples.

    samples of every pair, both orders --replayed by a way to vote--> verdict, probability, tokens spent --> curve, ECE

From the same samples: a majority in one order (voting@k), the same number of votes in both orders, each a whole vote or
weighted by the answer token's log-prob, votes without those that a consistency judge does not find supported, and
adaptive sampling that stops when the posterior is decided (`judging.votes`). No model is asked again.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_r1reward.evaluation.calibration import calibration, fit_halves
from megatron_r1reward.evaluation.result import (
    CalibrationBin,
    FittedCalibration,
    Interval,
    JudgedSamples,
    VoteBudget,
    VotingPoint,
)
from megatron_r1reward.evaluation.statistics import Estimate, estimate_share
from megatron_r1reward.judging.ask import ORDERS, Judgement, Order
from megatron_r1reward.judging.votes import Adaptive, Aggregator, probability, supported, verdict

Floats = NDArray[np.float64]
CONFIDENCES = (0.8, 0.9, 0.95, 0.99)  # of adaptive sampling
DEFAULT_CONFIDENCE = Adaptive().confidence
NO_JUDGE = "no consistency judge was asked"
JUDGE_FILTERED = "both orders, judge-filtered"
REPLAYS = 5  # orders of the samples, drawn; a figure is their mean


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A way to vote on P pairs, each value the mean over `REPLAYS` orders of the samples but for `p_right`."""

    accuracy: Floats  # [P], a tie is 1/2, no vote 0
    samples: Floats  # [P]
    tokens: Floats  # [P]
    p_right: Floats  # [P, REPLAYS], probability given to the right response; NaN without a vote
    fallbacks: Floats  # [P], orders of which the judge left no vote


def measure_votes(
    pairs: Sequence[Mapping[Order, Sequence[Judgement]]],
    items: Sequence[Hashable],
    *,
    voting: Mapping[int, tuple[float, Interval]],
    samples: int,
    seed: int,
    greedy: Sequence[Mapping[Order, Sequence[Judgement]]] = (),
    judged: JudgedSamples | str = NO_JUDGE,
) -> VoteBudget:
    """Replay the ways to vote.

    Args:
        pairs: P pairs' judgements by order, with `choice` 1 for the right response and 2 for the other one.
        items: P keys, see `estimate_share`.
        voting: k -> (accuracy, interval) of voting@k in one order, the mean of both orders.
        samples: K, asked for per order.
        seed: of the orders in which samples are replayed.
        greedy: the same pairs judged at temperature 0, for the calibration of that; (): not judged so.
        judged: what a consistency judge said about the samples, which carry it; or why there are no such votes.
    """
    single = [judgement.tokens for pair in pairs for order in ORDERS for judgement in pair[order]]
    mean_tokens = float(np.mean(single)) if single else 0.0
    points = [
        VotingPoint(
            method="one order",
            setting=f"voting@{k}",
            samples=k,
            tokens=k * mean_tokens,
            accuracy=mean,
            interval=interval,
        )
        for k, (mean, interval) in sorted(voting.items())
    ]
    weighted = any(one.p_first is not None for pair in pairs for order in ORDERS for one in pair[order])
    kinds: list[tuple[Aggregator, str]] = [("balanced", "both orders")]
    kinds += [("log_prob", "both orders, by log-prob")] if weighted else []
    fits: list[FittedCalibration | None] = []
    for aggregator, method in kinds:
        if greedy:
            found = replay(greedy, 1, seed, aggregator)
            fits.append(fit_halves(found.p_right, items, aggregator=aggregator, votes="greedy", seed=seed))
        for k in sorted({k for k in (1, 2, 3, 5, 8, *voting) if k <= samples}):
            found = replay(pairs, k, seed, aggregator)
            points.append(_point(method, f"{k} + {k}", found, items))
            fits.append(fit_halves(found.p_right, items, aggregator=aggregator, votes=str(k), seed=seed))
    if isinstance(judged, JudgedSamples):
        for k in sorted({k for k in (3, 5, 8, *voting) if 1 < k <= samples}):  # of a single vote none can be left out
            points.append(_point(JUDGE_FILTERED, f"{k} + {k}", replay(pairs, k, seed, filtered=True), items))
    bins: tuple[CalibrationBin, ...] = ()
    error: float | None = None
    for confidence in CONFIDENCES:
        rule = Adaptive(confidence=confidence, max_samples=min(Adaptive().max_samples, 2 * samples))
        found = replay(pairs, rule, seed)
        points.append(_point("adaptive", f"{confidence:g}", found, items))
        if confidence == DEFAULT_CONFIDENCE:
            error, bins = calibration(found.p_right.ravel())
            for aggregator, _ in kinds:
                found = replay(pairs, rule, seed, aggregator)
                name = f"adaptive {confidence:g}"
                fits.append(fit_halves(found.p_right, items, aggregator=aggregator, votes=name, seed=seed))
    return VoteBudget(
        points=tuple(points),
        cheapest=_cheapest(points),
        calibration_error=error,
        calibration=bins,
        fits=tuple(fit for fit in fits if fit is not None),
        judged=judged if isinstance(judged, JudgedSamples) else None,
        not_judged=judged if isinstance(judged, str) else None,
    )


def replay(
    pairs: Sequence[Mapping[Order, Sequence[Judgement]]],
    rule: int | Adaptive,
    seed: int,
    aggregator: Aggregator = "balanced",
    *,
    filtered: bool = False,
) -> Replayed:
    """Vote on every pair with samples in drawn orders: `rule` votes per order, or until `rule` has enough.

    Args:
        filtered: of these votes only those that the judge finds supported are counted.
    """
    generator = np.random.default_rng(seed)
    accuracy, samples, tokens, fallbacks = (np.zeros((len(pairs), REPLAYS)) for _ in range(4))
    p_right = np.full((len(pairs), REPLAYS), np.nan)
    for row, pair in enumerate(pairs):
        for column in range(REPLAYS):
            asked: list[Judgement] = []
            drawn = {order: generator.permutation(len(pair[order])) for order in ORDERS}
            for place in range(max(len(pair[order]) for order in ORDERS)):
                if place >= rule if isinstance(rule, int) else rule.enough(asked):
                    break
                asked += [pair[order][drawn[order][place]] for order in ORDERS if place < len(pair[order])]
            counted = asked
            if filtered:
                counted, fallbacks[row, column] = supported(asked)
            p = probability(counted, aggregator)
            if p is not None:
                p_right[row, column] = p
                accuracy[row, column] = {1: 1.0, 2: 0.0, None: 0.5}[verdict(p)]
            samples[row, column] = len(asked)
            tokens[row, column] = sum(judgement.tokens for judgement in asked)
    return Replayed(
        accuracy=accuracy.mean(axis=1),
        samples=samples.mean(axis=1),
        tokens=tokens.mean(axis=1),
        p_right=p_right,
        fallbacks=fallbacks.mean(axis=1),
    )


def _point(method: str, setting: str, found: Replayed, items: Sequence[Hashable]) -> VotingPoint:
    estimate: Estimate = estimate_share(found.accuracy, items)
    return VotingPoint(
        method=method,
        setting=setting,
        samples=float(found.samples.mean()),
        tokens=float(found.tokens.mean()),
        accuracy=estimate.mean,
        interval=estimate.interval,
        fallbacks=float(found.fallbacks.mean()),
    )


def _cheapest(points: Sequence[VotingPoint]) -> VotingPoint | None:
    """The way in both orders with the fewest tokens that is not below the interval of the most votes in one order.
    Judge-filtered votes are none: the judge's work is not in their tokens."""
    most = max(
        (point for point in points if point.method == "one order"), key=lambda point: point.samples, default=None
    )
    if most is None:
        return None
    others = (point for point in points if point.method not in ("one order", JUDGE_FILTERED))
    good = [point for point in others if point.accuracy >= most.interval[0]]
    return min(good, key=lambda point: point.tokens, default=None)
