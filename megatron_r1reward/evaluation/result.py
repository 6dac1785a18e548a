"""What an evaluation found, and its JSON form (`evaluation.json`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_r1reward.evaluation.statistics import Estimate
from megatron_r1reward.types import Label

Order = Literal["12", "21"]  # the stored order of the two responses, or swapped
ORDERS: tuple[Order, Order] = ("12", "21")


@dataclass(frozen=True, kw_only=True)
class Transcript:
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

    @property
    def correct(self) -> bool:
        return self.answer == self.label


@dataclass(frozen=True, kw_only=True)
class Counts:
    """`pairs` were evaluated with `samples` sampled responses in all; the others say what is missing and why."""

    pairs: int
    samples: int
    failed: int  # pairs left out: at least one of the two orders got no response
    quarantined: int  # responses refused for a banned token id; they count as unparsable
    without_partner: int  # control only: pairs left out because no other pair has images of the same sizes


@dataclass(frozen=True, kw_only=True)
class CategoryAccuracy:
    accuracy: Estimate
    pairs: int


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Every pair in both answer orders, several samples each. Accuracies are means over pairs of both orders."""

    accuracy: Estimate  # of a single sample
    accuracy_by_order: Mapping[Order, Estimate]
    order_consistency: Estimate  # share of pairs where the majority picks the same response in both orders
    voting: Mapping[int, Estimate]  # k -> voting@k
    any_correct: Mapping[int, Estimate]  # k -> any_correct@k
    mean_response_tokens: Estimate
    by_category: Mapping[str, CategoryAccuracy]
    unparsable_rate: Estimate  # share of the samples asked for
    format_rate: Estimate  # share of the samples asked for
    answer_1_rate: float | None  # share of parsed answers; None when no answer parses
    counts: Counts
    transcripts: tuple[Transcript, ...]
    shuffled_images: bool

    def to_json(self) -> dict[str, Any]:
        """JSON values only. A key `x` holds the mean(s), `x_interval(s)` the 95 % interval(s) [low, high]."""
        return {
            "accuracy": self.accuracy.mean,
            "interval": self.accuracy.interval,
            **_means_and_intervals("accuracy_by_order", self.accuracy_by_order),
            "order_consistency": self.order_consistency.mean,
            "order_consistency_interval": self.order_consistency.interval,
            **_means_and_intervals("voting", self.voting),
            **_means_and_intervals("any_correct", self.any_correct),
            "unparsable_rate": self.unparsable_rate.mean,
            "unparsable_rate_interval": self.unparsable_rate.interval,
            "format_rate": self.format_rate.mean,
            "format_rate_interval": self.format_rate.interval,
            "answer_1_rate": self.answer_1_rate,
            "mean_response_tokens": self.mean_response_tokens.mean,
            "mean_response_tokens_interval": self.mean_response_tokens.interval,
            "by_category": {
                name: {"accuracy": found.accuracy.mean, "interval": found.accuracy.interval, "pairs": found.pairs}
                for name, found in self.by_category.items()
            },
            "counts": asdict(self.counts),
            "shuffled_images": self.shuffled_images,
            "transcripts": [{**asdict(entry), "correct": entry.correct} for entry in self.transcripts],
        }


def _means_and_intervals(name: str, estimates: Mapping[Any, Estimate]) -> dict[str, dict[str, Any]]:
    """{"voting": {"5": mean}, "voting_intervals": {"5": [low, high]}}; `voting` names its intervals in the plural."""
    return {
        name: {str(key): estimate.mean for key, estimate in estimates.items()},
        f"{name}_intervals": {str(key): estimate.interval for key, estimate in estimates.items()},
    }
