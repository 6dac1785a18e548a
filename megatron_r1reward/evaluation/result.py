"""What an evaluation found. The same model is written as `evaluation.json` and read from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field

from megatron_r1reward.evaluation.statistics import Estimate
from megatron_r1reward.types import Label

Order = Literal["12", "21"]  # the stored order of the two responses, or swapped
ORDERS: tuple[Order, Order] = ("12", "21")
Interval = tuple[float, float]  # 95 %, [low, high]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")  # a newer version may have written more


class Transcript(_Part):
    """One sampled judgement to read. `responses` and `label` are in the order in which the model saw them."""

    preference_id: str
    category: str
    order: Order
    question: str
    responses: tuple[str, str]
    label: Label
    image_paths: tuple[str, ...]
    text: str
    answer: Label | None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def correct(self) -> bool:
        return self.answer == self.label


class Counts(_Part):
    """`pairs` were evaluated with `samples` sampled responses in all; the others say what is missing and why."""

    pairs: int
    samples: int
    failed: int  # pairs left out: a prompt of theirs was not answered by any server
    quarantined: int = 0  # responses refused for a banned token id; they count as unparsable
    truncated: int = 0  # responses cut off by the token limit; what they say counts, but they are not well formed
    without_partner: int = 0  # control only: pairs left out because no other pair has images of the same sizes


class CategoryAccuracy(_Part):
    accuracy: float
    interval: Interval
    pairs: int


class VotingPoint(_Part):
    """A way to vote, per pair: what it costs and how often it is right."""

    method: str  # "one order", "both orders", "both orders, by log-prob", "both orders, judge-filtered", "adaptive"
    setting: str  # voting@k; votes per order; confidence at which sampling stops
    samples: float
    tokens: float  # generated
    accuracy: float  # a tie counts 1/2
    interval: Interval
    fallbacks: float = 0.0  # judge-filtered: orders per pair of which no vote was left, so that all of them counted


class JudgedSamples(_Part):
    """What a consistency judge says about the samples that have a verdict: does the reasoning support it?"""

    judge: str
    consistent: int
    inconsistent: int  # left out by judge-filtered votes
    unknown: int  # the judge gave no verdict; they count


class CalibrationBin(_Part):
    confidence: float  # mean probability of the verdicts
    accuracy: float  # share of them that are right
    share: float  # of all verdicts


class FittedCalibration(_Part):
    """A temperature for one way of voting, fitted on half of the items and measured on the others."""

    aggregator: Literal["majority", "balanced", "log_prob"]
    votes: str  # "greedy", judgements per order ("3"), "adaptive 0.9"
    temperature: float  # log-odds are divided by it
    items: int  # of the fit
    measured_items: int
    error_before: float  # expected calibration error
    error_after: float
    bins_before: tuple[CalibrationBin, ...]
    bins_after: tuple[CalibrationBin, ...]


class VoteBudget(_Part):
    """Accuracy against generated tokens, replayed on the evaluation's own samples."""

    points: tuple[VotingPoint, ...]
    cheapest: VotingPoint | None  # in both orders, not below the interval of the most votes in one order; None: none is
    calibration_error: float | None  # expected, of the probabilities of adaptive sampling; None: nothing parsed
    calibration: tuple[CalibrationBin, ...]  # reliability diagram
    fits: tuple[FittedCalibration, ...] = ()  # none: too few items, or written by an earlier version
    judged: JudgedSamples | None = None  # None: there are no judge-filtered votes
    not_judged: str | None = None  # why; None as well: written by an earlier version


class OrderAccuracy(_Part):
    """Both answer orders of every pair."""

    accuracy: float  # of a single sample, mean over pairs of both orders; what does not parse is not right
    interval: Interval
    accuracy_by_order: Mapping[Order, float]
    accuracy_by_order_intervals: Mapping[Order, Interval]
    order_consistency: float  # share of pairs where the majority picks the same response in both orders
    order_consistency_interval: Interval
    unparsable_rate: float  # share of the samples asked for
    unparsable_rate_interval: Interval
    format_rate: float  # share of the samples asked for
    format_rate_interval: Interval
    answer_1_rate: float | None  # share of parsed answers; None when no answer parses
    counts: Counts


class GreedyAccuracy(OrderAccuracy):
    """At temperature 0, one response per pair and order."""


class PairKind(_Part):
    """Pairs of one kind, judged greedily in both orders."""

    kind: str  # "right against wrong", and those of `control_sets`
    pairs: int
    first_place: float | None  # share of the verdicts that are 1; None: no verdict
    first_place_interval: Interval | None
    order_agreement: float | None  # share of the pairs with the same choice in both orders; None: it means nothing
    order_agreement_interval: Interval | None


class EvaluationResult(OrderAccuracy):
    """Every pair in both answer orders, several samples each. A key `x` has its 95 % interval in `x_interval(s)`."""

    kind: Literal["generative"] = "generative"
    voting: Mapping[str, float]  # "k" -> voting@k
    voting_intervals: Mapping[str, Interval]
    any_correct: Mapping[str, float]  # "k" -> any_correct@k
    any_correct_intervals: Mapping[str, Interval]
    mean_response_tokens: float
    mean_response_tokens_interval: Interval
    by_category: Mapping[str, CategoryAccuracy]
    weights: str | None = None  # `model_identity` of the folder; None: servers at URLs, or an earlier version
    data: str | None = None  # name of the file with the pairs
    transcripts: tuple[Transcript, ...] = ()
    shuffled_images: bool = False
    greedy: GreedyAccuracy | None = None  # None: not asked for, or written by an earlier version
    vote_budget: VoteBudget | None = None  # None: the control, or written by an earlier version
    pair_kinds: tuple[PairKind, ...] = ()  # none: not asked for, or written by an earlier version
    control: EvaluationResult | None = None  # with another pair's images

    def to_json(self) -> str:
        """The content of `evaluation.json`."""
        return self.model_dump_json(indent=2) + "\n"


class ScalarEvaluation(_Part):
    """The same of a scalar or pointwise reward model, which scores each response of a pair once: a tie counts 1/2, and
    both orders are equal by construction. `absent`: keys of `EvaluationResult` that mean nothing here, with the
    reason."""

    kind: Literal["scalar", "pointwise"]
    accuracy: float
    interval: Interval
    accuracy_by_order: Mapping[Order, float]
    accuracy_by_order_intervals: Mapping[Order, Interval]
    order_consistency: float
    by_category: Mapping[str, CategoryAccuracy]
    counts: Counts  # its samples are the responses that were scored
    calibration_error: float | None  # expected, of sigmoid(r_1 - r_2)
    calibration: tuple[CalibrationBin, ...]
    calls: int
    tokens: int  # read; of a pointwise model: generated
    unrated: int = 0  # responses of a pointwise model without a rating, whose pairs are not right
    seconds: float  # of asking, the servers being ready
    absent: Mapping[str, str]
    weights: str | None = None
    data: str | None = None
    shuffled_images: bool = False
    control: ScalarEvaluation | None = None  # with another pair's images

    def to_json(self) -> str:
        """The content of `evaluation.json`."""
        return self.model_dump_json(indent=2) + "\n"


def parse_evaluation(text: str) -> EvaluationResult | ScalarEvaluation:
    """What an `evaluation.json` says, of either kind.

    Raises:
        ValueError: it is none.
    """
    tree = json.loads(text)
    alone = isinstance(tree, dict) and tree.get("kind") in ("scalar", "pointwise")
    return ScalarEvaluation.model_validate(tree) if alone else EvaluationResult.model_validate(tree)


def one(name: str, estimate: Estimate, interval: str | None = None) -> dict[str, Any]:
    """{"x": mean, "x_interval": (low, high)}."""
    return {name: estimate.mean, interval or f"{name}_interval": estimate.interval}


def several(name: str, estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """{"x": {"5": mean}, "x_intervals": {"5": (low, high)}}."""
    return {
        name: {key: estimate.mean for key, estimate in estimates.items()},
        f"{name}_intervals": {key: estimate.interval for key, estimate in estimates.items()},
    }
