"""Evaluation on preference pairs: every pair in BOTH answer orders, several samples each.

Both orders, because a model that always answers "1" would score 100 % where the better response always comes first.
Several samples, because the accuracy of one sample and of a majority vote are then exact expectations (`voting`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.evaluation.control_sets import SAME
from megatron_r1reward.evaluation.control_sets import shuffle_images as with_shuffled_images
from megatron_r1reward.evaluation.judged_pair import JudgedPair, Sample, as_right_and_wrong, ask_about, category_of
from megatron_r1reward.evaluation.judged_votes import VoteJudge
from megatron_r1reward.evaluation.result import (
    ORDERS,
    CategoryAccuracy,
    Counts,
    EvaluationResult,
    GreedyAccuracy,
    Order,
    PairKind,
    Transcript,
    one,
    several,
)
from megatron_r1reward.evaluation.statistics import Estimate, estimate_mean, estimate_share
from megatron_r1reward.evaluation.vote_budget import NO_JUDGE, measure_votes
from megatron_r1reward.evaluation.voting import (
    Floats,
    Votes,
    any_correct,
    count_votes,
    order_agreement,
    voting_accuracy,
)
from megatron_r1reward.reward.readers import Reader
from megatron_r1reward.reward.rules import parse_rollout
from megatron_r1reward.types import Preference, Prompt, Rollout


class PromptSource(Protocol):
    """What renders a preference as a prompt: `data.prompt.PromptBuilder`."""

    def build(self, preference: Preference, *, swapped: bool) -> Prompt: ...


class Generated(Protocol):
    @property
    def rollouts(self) -> tuple[Rollout, ...]: ...
    @property
    def quarantined(self) -> tuple[Rollout, ...]: ...


class Generator(Protocol):
    """What samples responses: `rollout.pool.RolloutPool`. A prompt has n rollouts and quarantined ones in all, or none
    when it failed."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingSection,
        *,
        n: int,
        seed: int,
        progress: Callable[..., Any] | None = None,
    ) -> Generated: ...


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
    greedy: bool = False,
    extra: Mapping[str, Sequence[Preference]] | None = None,
    transcripts: int = 6,
    read: Reader | None = None,
    token_text: Callable[[int], str] | None = None,
    judge: VoteJudge | str = NO_JUDGE,
    progress: Callable[..., Any] | None = None,
) -> EvaluationResult:
    """Sample every pair in both orders and summarise.

    The denominator is every pair that the servers answered in both orders. What the model said counts, whatever it
    is: an answer that does not parse, or a response that was quarantined for a banned token, is not right. Only a pair
    of which a prompt failed (refused, or no server answered) is left out, and counted in `Counts.failed`.

    Args:
        preferences: the pairs, with unique ids.
        samples: K, responses per pair and order, at the temperature of `sampling`.
        voting: the k of voting@k and any_correct@k, each in [1, K].
        seed: of the sampling, the bootstrap, the shuffle and the choice of transcripts.
        shuffle_images: the control: everything the same, but each pair sees the images of another one.
        greedy: once more at temperature 0, one response per pair and order.
        extra: pairs of other kinds by name, see `make_pair_kinds`, judged once at temperature 0.
        transcripts: how many judgements to return in full, chosen by pairs and seed alone, so that models compare.
        read: how verdicts are read; None: by the strict rule.
        token_text: what a token says, for votes weighted by the answer token's log-prob; None: no such votes.
        judge: of the reasonings, for judge-filtered votes; or why there are no such votes.
        progress: handed to the pool.

    Raises:
        ValueError: a k of `voting` exceeds `samples`, ids repeat, or no pair was answered.
    """
    _check(preferences, samples, voting)
    shown = with_shuffled_images(preferences, seed) if shuffle_images else tuple(preferences)
    prompts = [prompt_builder.build(pair, swapped=swapped) for pair in shown for swapped in (False, True)]
    pairs, counts = _ask(pool, shown, prompts, sampling, samples, seed, progress, read)
    counts = counts.model_copy(update={"without_partner": len(preferences) - len(shown)})
    result = _summarise(pairs, counts, samples=samples, voting=voting, seed=seed)
    update: dict[str, Any] = {
        "transcripts": _choose_transcripts(preferences, pairs, transcripts, seed),
        "shuffled_images": shuffle_images,
    }
    coldest = sampling.model_copy(update={"temperature": 0.0})
    kinds = {}
    decided: list[JudgedPair] = []
    if greedy:
        decided, counted = _ask(pool, shown, prompts, coldest, 1, seed, progress, read)
        update["greedy"] = GreedyAccuracy(**_both_orders(decided, counted, 1))
        kinds["right against wrong"] = decided
    if extra:
        fitting = {name: _that_fit(pairs, prompt_builder) for name, pairs in extra.items()}
        built = [built for part in fitting.values() for _, prompts in part for built in prompts]
        made = [pair for part in fitting.values() for pair, _ in part]
        found, _ = _ask(pool, made, built, coldest, 1, seed, progress, read) if made else ([], None)
        of = {pair.id: name for name, part in fitting.items() for pair, _ in part}
        for name in fitting:
            kinds[name] = [pair for pair in found if of[pair.preference.id] == name]
        update["pair_kinds"] = tuple(_pair_kind(name, pairs) for name, pairs in kinds.items() if pairs)
    if not shuffle_images:
        cold = {pair.preference.id: pair for pair in decided}
        told, judged = ask_about(pairs, judge)
        update["vote_budget"] = measure_votes(
            [as_right_and_wrong(pair, token_text) for pair in told],
            [pair.item for pair in pairs],
            voting={int(k): (result.voting[k], result.voting_intervals[k]) for k in result.voting},
            samples=samples,
            seed=seed,
            greedy=[as_right_and_wrong(cold.get(pair.preference.id), token_text) for pair in pairs] if cold else (),
            judged=judged,
        )
    return result.model_copy(update=update)


def _that_fit(
    pairs: Sequence[Preference], prompt_builder: PromptSource
) -> list[tuple[Preference, tuple[Prompt, Prompt]]]:
    """Pairs with their prompts; without those of which a prompt is too long, which the data themselves cannot hold."""
    fitting = []
    for pair in pairs:
        try:
            prompts = (prompt_builder.build(pair, swapped=False), prompt_builder.build(pair, swapped=True))
        except ValueError:
            continue
        fitting.append((pair, prompts))
    return fitting


def _pair_kind(name: str, pairs: Sequence[JudgedPair]) -> PairKind:
    """How often the first place wins, and how often both orders choose the same response."""
    answers = [[said.parsed.answer for part in pair.samples.values() for said in part] for pair in pairs]
    decided = [
        (pair.item, [one == 1 for one in part if one is not None])
        for pair, part in zip(pairs, answers, strict=True)
        if any(part)
    ]
    first, agree = None, None
    if decided:
        first = estimate_share([float(np.mean(ones)) for _, ones in decided], [item for item, _ in decided])
    if name != SAME:
        agree = estimate_share(
            order_agreement(_votes(pairs, "12", 1), _votes(pairs, "21", 1)), [pair.item for pair in pairs]
        )
    return PairKind(
        kind=name,
        pairs=len(pairs),
        first_place=None if first is None else first.mean,
        first_place_interval=None if first is None else first.interval,
        order_agreement=None if agree is None else agree.mean,
        order_agreement_interval=None if agree is None else agree.interval,
    )


def _ask(
    pool: Generator,
    preferences: Sequence[Preference],
    prompts: Sequence[Prompt],
    sampling: SamplingSection,
    samples: int,
    seed: int,
    progress: Callable[..., Any] | None,
    read: Reader | None,
) -> tuple[list[JudgedPair], Counts]:
    """The pairs that were answered in both orders. `prompts` holds two per preference, in `ORDERS`."""
    generated = pool.generate(prompts, sampling, n=samples, seed=seed, progress=progress)
    answered = {rollout.prompt.id for rollout in (*generated.rollouts, *generated.quarantined)}
    by_prompt: dict[str, list[Sample]] = defaultdict(list)
    for rollout in generated.rollouts:
        by_prompt[rollout.prompt.id].append(Sample(rollout=rollout, parsed=parse_rollout(rollout, read=read)))
    pairs = []
    for preference, first, second in zip(preferences, prompts[::2], prompts[1::2], strict=True):
        if {first.id, second.id} <= answered:
            shown = dict(zip(ORDERS, (first, second), strict=True))
            pairs.append(
                JudgedPair(
                    preference=preference,
                    samples={order: tuple(by_prompt[prompt.id]) for order, prompt in shown.items()},
                    labels={order: prompt.known_label for order, prompt in shown.items()},
                )
            )
    if not pairs:
        raise ValueError(f"none of {len(preferences)} pairs was answered in both orders: see the log of the servers")
    flat = [sample for pair in pairs for part in pair.samples.values() for sample in part]
    return pairs, Counts(
        pairs=len(pairs),
        samples=len(flat),
        failed=len(preferences) - len(pairs),
        quarantined=len(generated.quarantined),
        truncated=sum(sample.rollout.finish_reason == "length" for sample in flat),
    )


def _check(preferences: Sequence[Preference], samples: int, voting: Sequence[int]) -> None:
    too_large = [k for k in voting if not 1 <= k <= samples]
    if too_large:
        raise ValueError(f"evaluation.voting {too_large} is not within 1 and evaluation.samples {samples}: change one")
    repeated = [name for name, count in Counter(pair.id for pair in preferences).items() if count > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} preference ids repeat, the first is {repeated[0]!r}: make them unique")


def _summarise(
    pairs: Sequence[JudgedPair], counts: Counts, *, samples: int, voting: Sequence[int], seed: int
) -> EvaluationResult:
    votes = {order: _votes(pairs, order, samples) for order in ORDERS}
    items = [pair.item for pair in pairs]

    def by_k(measure: Callable[[Votes, int], Floats]) -> dict[str, Estimate]:
        measured = {k: np.mean([measure(votes[order], k) for order in ORDERS], axis=0) for k in voting}
        return {str(k): estimate_share(values, items) for k, values in measured.items()}

    tokens = [length for pair in pairs if (length := _mean_tokens(pair)) is not None]
    told = [pair.item for pair in pairs if _mean_tokens(pair) is not None]
    single = np.mean([voting_accuracy(votes[order], 1) for order in ORDERS], axis=0)
    return EvaluationResult(
        **_both_orders(pairs, counts, samples),
        **several("voting", by_k(voting_accuracy)),
        **several("any_correct", by_k(any_correct)),
        **one("mean_response_tokens", estimate_mean(tokens or [0.0], told or None, seed=seed)),
        by_category=accuracy_by_category(pairs, single),
    )


def _both_orders(pairs: Sequence[JudgedPair], counts: Counts, samples: int) -> dict[str, Any]:
    """The fields of `OrderAccuracy`."""
    votes = {order: _votes(pairs, order, samples) for order in ORDERS}
    single = {order: voting_accuracy(votes[order], 1) for order in ORDERS}
    items = [pair.item for pair in pairs]
    flat = [sample for pair in pairs for part in pair.samples.values() for sample in part]
    answers = [sample.parsed.answer for sample in flat if sample.parsed.answer is not None]

    def estimate(values: Floats) -> Estimate:
        return estimate_share(values, items)

    return {
        **one("accuracy", estimate(np.mean([single[order] for order in ORDERS], axis=0)), "interval"),
        **several("accuracy_by_order", {order: estimate(single[order]) for order in ORDERS}),
        **one("order_consistency", estimate(order_agreement(votes["12"], votes["21"]))),
        **one("unparsable_rate", estimate(1.0 - _share(pairs, samples, lambda one: one.parsed.answer is not None))),
        **one("format_rate", estimate(_share(pairs, samples, lambda one: one.parsed.well_formed))),
        "answer_1_rate": answers.count(1) / len(answers) if answers else None,
        "counts": counts,
    }


def _votes(pairs: Sequence[JudgedPair], order: Order, samples: int) -> Votes:
    choices = [[sample.parsed.answer for sample in pair.samples[order]] for pair in pairs]
    return count_votes(choices, [pair.labels[order] for pair in pairs], samples)


def _share(pairs: Sequence[JudgedPair], samples: int, holds: Callable[[Sample], bool]) -> Floats:
    """Per pair, the share of the samples asked for (both orders) that exist and for which `holds`."""
    counts = [sum(holds(sample) for part in pair.samples.values() for sample in part) for pair in pairs]
    return np.array(counts) / (2 * samples)


def _mean_tokens(pair: JudgedPair) -> float | None:
    lengths = [len(sample.rollout.token_ids) for part in pair.samples.values() for sample in part]
    return float(np.mean(lengths)) if lengths else None


def accuracy_by_category(pairs: Sequence[JudgedPair], accuracy: Floats) -> dict[str, CategoryAccuracy]:
    """`accuracy` [P] of each pair, by category, with intervals over items."""
    members: dict[str, list[int]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        members[pair.category].append(index)
    found = {}
    for name, indices in sorted(members.items()):
        estimate = estimate_share(accuracy[indices], [pairs[index].item for index in indices])
        found[name] = CategoryAccuracy(accuracy=estimate.mean, interval=estimate.interval, pairs=len(indices))
    return found


def _choose_transcripts(
    preferences: Sequence[Preference], pairs: Sequence[JudgedPair], count: int, seed: int
) -> tuple[Transcript, ...]:
    """First samples of `count` pairs, dealt round-robin over the categories, alternating between the two orders."""
    by_category: dict[str, list[str]] = defaultdict(list)
    for index in np.random.default_rng(seed).permutation(len(preferences)):
        by_category[category_of(preferences[index])].append(preferences[index].id)
    rounds = zip_longest(*(by_category[name] for name in sorted(by_category)))
    chosen = [name for dealt in rounds for name in dealt if name is not None][:count]
    judged = {pair.preference.id: pair for pair in pairs}
    return tuple(
        _transcript(judged[name], ORDERS[place % 2])
        for place, name in enumerate(chosen)
        if name in judged and judged[name].samples[ORDERS[place % 2]]
    )


def _transcript(pair: JudgedPair, order: Order) -> Transcript:
    sample, first = pair.samples[order][0], pair.preference
    return Transcript(
        preference_id=first.id,
        category=pair.category,
        order=order,
        question=first.question,
        responses=first.responses if order == "12" else (first.responses[1], first.responses[0]),
        label=sample.rollout.prompt.known_label,
        image_paths=first.image_paths,
        text=sample.rollout.text,
        answer=sample.parsed.answer,
    )
