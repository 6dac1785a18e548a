"""Evaluation on preference pairs: every pair in BOTH answer orders, several samples each.

Both orders, because a model that always answers "1" would score 100 % where the better response always comes first.
Several samples, because the accuracy of one sample and of a majority vote are then exact expectations (`voting`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.evaluation.result import (
    ORDERS,
    CategoryAccuracy,
    Counts,
    EvaluationResult,
    Order,
    Transcript,
)
from megatron_r1reward.evaluation.shuffled_images import shuffle_images as with_shuffled_images
from megatron_r1reward.evaluation.statistics import Estimate, bootstrap_mean
from megatron_r1reward.evaluation.voting import (
    Floats,
    Votes,
    any_correct,
    count_votes,
    order_agreement,
    voting_accuracy,
)
from megatron_r1reward.reward.rules import ParsedResponse, parse_response
from megatron_r1reward.types import Preference, Prompt, Rollout

NO_CATEGORY = "uncategorised"


class PromptSource(Protocol):
    """What renders a preference as a prompt: `data.prompt.PromptBuilder`."""

    def build(self, preference: Preference, *, swapped: bool) -> Prompt: ...


class Generated(Protocol):
    @property
    def rollouts(self) -> tuple[Rollout, ...]: ...
    @property
    def quarantined(self) -> tuple[Rollout, ...]: ...


class Generator(Protocol):
    """What samples responses: `rollout.pool.RolloutPool`. A prompt has n rollouts, fewer where some were quarantined,
    or none when it failed."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSection,
        *,
        n: int,
        seed: int,
        progress: Callable[..., Any] | None = None,
    ) -> Generated: ...


@dataclass(frozen=True, kw_only=True)
class Sample:
    rollout: Rollout
    parsed: ParsedResponse


@dataclass(frozen=True, kw_only=True)
class JudgedPair:
    """A preference and what the model said about it, by answer order; at least one sample in each."""

    preference: Preference
    samples: Mapping[Order, tuple[Sample, ...]]

    @property
    def category(self) -> str:
        return _category(self.preference)


def evaluate(
    preferences: Sequence[Preference],
    pool: Generator,
    prompt_builder: PromptSource,
    sampling: SamplingSection,
    *,
    samples: int,
    voting: Sequence[int],
    seed: int,
    shuffle_images: bool = False,
    transcripts: int = 6,
    progress: Callable[..., Any] | None = None,
) -> EvaluationResult:
    """Sample every pair in both orders and summarise.

    Args:
        preferences: the pairs, with unique ids.
        samples: K, responses per pair and order, at the temperature of `sampling`.
        voting: the k of voting@k and any_correct@k, each in [1, K].
        seed: of the sampling, the bootstrap, the shuffle and the choice of transcripts.
        shuffle_images: the control: everything the same, but each pair sees the images of another one.
        transcripts: how many judgements to return in full. The choice depends on the pairs and the seed alone, so
            that evaluations of two models can be read side by side.
        progress: handed to the pool.

    Raises:
        ValueError: a k of `voting` exceeds `samples`, ids repeat, or fewer than two pairs got a response.
    """
    _check(preferences, samples, voting)
    shown = with_shuffled_images(preferences, seed) if shuffle_images else tuple(preferences)
    prompts = [prompt_builder.build(pair, swapped=swapped) for pair in shown for swapped in (False, True)]
    generated = pool.generate(prompts, sampling, n=samples, seed=seed, progress=progress)
    pairs = _judged_pairs(shown, prompts, generated.rollouts)
    if len(pairs) < 2:
        raise ValueError(
            f"{len(pairs)} of {len(shown)} pairs got responses in both orders, an interval needs two: give more pairs, "
            "or see the log of the servers"
        )
    counts = Counts(
        pairs=len(pairs),
        samples=sum(len(part) for pair in pairs for part in pair.samples.values()),
        failed=len(shown) - len(pairs),
        quarantined=len(generated.quarantined),
        without_partner=len(preferences) - len(shown),
    )
    return _summarise(
        pairs,
        counts,
        samples=samples,
        voting=voting,
        seed=seed,
        transcripts=_choose_transcripts(preferences, pairs, transcripts, seed),
        shuffled_images=shuffle_images,
    )


def _check(preferences: Sequence[Preference], samples: int, voting: Sequence[int]) -> None:
    too_large = [k for k in voting if not 1 <= k <= samples]
    if too_large:
        raise ValueError(f"evaluation.voting {too_large} is not within 1 and evaluation.samples {samples}: change one")
    repeated = [name for name, count in Counter(pair.id for pair in preferences).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} preference ids repeat, the first is {repeated[0]!r}: make them unique")


def _judged_pairs(
    preferences: Sequence[Preference], prompts: Sequence[Prompt], rollouts: Sequence[Rollout]
) -> list[JudgedPair]:
    """Pairs with at least one response in both orders. `prompts` holds two per preference, in `ORDERS`."""
    by_prompt: dict[str, list[Sample]] = defaultdict(list)
    for rollout in rollouts:
        by_prompt[rollout.prompt.id].append(Sample(rollout=rollout, parsed=parse_response(rollout.text)))
    pairs = []
    for preference, first, second in zip(preferences, prompts[::2], prompts[1::2], strict=True):
        samples = {order: tuple(by_prompt[prompt.id]) for order, prompt in zip(ORDERS, (first, second), strict=True)}
        if all(samples.values()):
            pairs.append(JudgedPair(preference=preference, samples=samples))
    return pairs


def _summarise(
    pairs: Sequence[JudgedPair],
    counts: Counts,
    *,
    samples: int,
    voting: Sequence[int],
    seed: int,
    transcripts: tuple[Transcript, ...],
    shuffled_images: bool,
) -> EvaluationResult:
    votes = {order: _votes(pairs, order, samples) for order in ORDERS}
    single = {order: voting_accuracy(votes[order], 1) for order in ORDERS}
    flat = [sample for pair in pairs for part in pair.samples.values() for sample in part]
    answers = [sample.parsed.answer for sample in flat if sample.parsed.answer is not None]

    def estimate(values: Floats) -> Estimate:
        return bootstrap_mean(values, seed=seed)

    def both_orders(measure: Callable[[Votes, int], Floats], k: int) -> Estimate:
        return estimate(np.mean([measure(votes[order], k) for order in ORDERS], axis=0))

    return EvaluationResult(
        accuracy=both_orders(voting_accuracy, 1),
        accuracy_by_order={order: estimate(single[order]) for order in ORDERS},
        order_consistency=estimate(order_agreement(votes["12"], votes["21"])),
        voting={k: both_orders(voting_accuracy, k) for k in voting},
        any_correct={k: both_orders(any_correct, k) for k in voting},
        mean_response_tokens=estimate(np.array([_mean_tokens(pair) for pair in pairs])),
        by_category=_by_category(pairs, np.mean([single[order] for order in ORDERS], axis=0), seed),
        unparsable_rate=estimate(1.0 - _share(pairs, samples, lambda sample: sample.parsed.answer is not None)),
        format_rate=estimate(_share(pairs, samples, lambda sample: sample.parsed.well_formed)),
        answer_1_rate=answers.count(1) / len(answers) if answers else None,
        counts=counts,
        transcripts=transcripts,
        shuffled_images=shuffled_images,
    )


def _votes(pairs: Sequence[JudgedPair], order: Order, samples: int) -> Votes:
    choices = [[sample.parsed.answer for sample in pair.samples[order]] for pair in pairs]
    labels = [pair.samples[order][0].rollout.prompt.label for pair in pairs]
    return count_votes(choices, labels, samples)


def _share(pairs: Sequence[JudgedPair], samples: int, holds: Callable[[Sample], bool]) -> Floats:
    """Per pair, the share of the samples asked for (both orders) that exist and for which `holds`."""
    counts = [sum(holds(sample) for part in pair.samples.values() for sample in part) for pair in pairs]
    return np.array(counts) / (2 * samples)


def _mean_tokens(pair: JudgedPair) -> float:
    return float(np.mean([len(sample.rollout.token_ids) for part in pair.samples.values() for sample in part]))


def _by_category(pairs: Sequence[JudgedPair], accuracy: Floats, seed: int) -> dict[str, CategoryAccuracy]:
    members: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        members[pair.category].append(index)
    found = {}
    for name, indices in sorted(members.items()):
        values = accuracy[indices]
        # One pair says nothing about the others of its category: the interval is all there is.
        single = Estimate(mean=float(values[0]), low=0.0, high=1.0)
        estimate = bootstrap_mean(values, seed=seed) if len(indices) > 1 else single
        found[name] = CategoryAccuracy(accuracy=estimate, pairs=len(indices))
    return found


def _choose_transcripts(
    preferences: Sequence[Preference], pairs: Sequence[JudgedPair], count: int, seed: int
) -> tuple[Transcript, ...]:
    """First samples of `count` pairs, dealt round-robin over the categories, alternating between the two orders."""
    by_category: dict[str, list[str]] = defaultdict(list)
    for index in np.random.default_rng(seed).permutation(len(preferences)):
        by_category[_category(preferences[index])].append(preferences[index].id)
    rounds = zip_longest(*(by_category[name] for name in sorted(by_category)))
    chosen = [name for dealt in rounds for name in dealt if name is not None][:count]
    judged = {pair.preference.id: pair for pair in pairs}
    return tuple(_transcript(judged[name], ORDERS[place % 2]) for place, name in enumerate(chosen) if name in judged)


def _transcript(pair: JudgedPair, order: Order) -> Transcript:
    sample, first = pair.samples[order][0], pair.preference
    return Transcript(
        preference_id=first.id,
        category=pair.category,
        order=order,
        question=first.question,
        responses=first.responses if order == "12" else (first.responses[1], first.responses[0]),
        label=sample.rollout.prompt.label,
        image_paths=first.image_paths,
        text=sample.rollout.text,
        answer=sample.parsed.answer,
    )


def _category(preference: Preference) -> str:
    return preference.metadata.get("category", NO_CATEGORY)
