"""A preference pair and what the model said about it in both orders, and the same as votes for the right response."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_r1reward.evaluation.judged_votes import VoteJudge, ask_judge
from megatron_r1reward.evaluation.result import ORDERS, JudgedSamples, Order
from megatron_r1reward.judging.ask import Judgement
from megatron_r1reward.reward.rules import ParsedResponse, answer_probability
from megatron_r1reward.types import Label, Preference, Rollout

NO_CATEGORY = "uncategorised"
TokenText = Callable[[int], str]


@dataclass(frozen=True, kw_only=True)
class Sample:
    rollout: Rollout
    parsed: ParsedResponse
    consistent: bool | None = None  # whether the reasoning supports the verdict, as a judge says; None: it does not


@dataclass(frozen=True, kw_only=True)
class JudgedPair:
    """A preference and what the model said about it, by answer order. Responses that were quarantined are missing
    here; the model gave them, so they count as answers that do not parse."""

    preference: Preference
    samples: Mapping[Order, tuple[Sample, ...]]
    labels: Mapping[Order, Label]

    @property
    def category(self) -> str:
        return category_of(self.preference)

    @property
    def item(self) -> Hashable:
        """Pairs about the same images and question are not independent of each other."""
        return self.preference.metadata.get("item") or (self.preference.question, self.preference.image_paths)


def category_of(preference: Preference) -> str:
    return preference.metadata.get("category", NO_CATEGORY)


def ask_about(pairs: Sequence[JudgedPair], judge: VoteJudge | str) -> tuple[list[JudgedPair], JudgedSamples | str]:
    """The pairs with what a judge says about the reasoning of each sample, and how often it says what; or why not."""
    having = [one for pair in pairs for order in ORDERS for one in pair.samples[order] if one.parsed.answer is not None]
    said, found = ask_judge(judge, [(one.parsed.reasoning, one.parsed.answer) for one in having if one.parsed.answer])
    of = {id(one): verdict for one, verdict in zip(having, said, strict=True)}
    told = [
        replace(
            pair,
            samples={
                order: tuple(replace(one, consistent=of.get(id(one))) for one in part)
                for order, part in pair.samples.items()
            },
        )
        for pair in pairs
    ]
    return told, found


def as_right_and_wrong(pair: JudgedPair | None, token_text: TokenText | None) -> dict[Order, list[Judgement]]:
    """For `measure_votes`: choice 1 is the right response. None: not judged."""
    if pair is None:
        return {order: [] for order in ORDERS}
    return {
        order: [_right_or_wrong(sample, order, pair.labels[order], token_text) for sample in pair.samples[order]]
        for order in ORDERS
    }


def _right_or_wrong(sample: Sample, order: Order, label: Label, token_text: TokenText | None) -> Judgement:
    answer, p_answer = sample.parsed.answer, None
    if answer is not None and token_text is not None:
        p_answer = answer_probability(sample.rollout, token_text)
    right = answer == label
    return Judgement(
        order=order,
        choice=None if answer is None else 1 if right else 2,
        p_first=None if p_answer is None else p_answer if right else 1.0 - p_answer,
        text=sample.rollout.text,
        reasoning=sample.parsed.reasoning,
        tokens=len(sample.rollout.token_ids),
        finish_reason=sample.rollout.finish_reason,
        consistent=sample.consistent,
    )
