"""Evaluation of a scalar or pointwise reward model on preference pairs: each response scored once, the better one has
the higher reward. What samples and texts are needed for is absent, and `ABSENT` says why."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.evaluation.calibration import calibration
from megatron_r1reward.evaluation.control_sets import shuffle_images as with_shuffled_images
from megatron_r1reward.evaluation.evaluate import Generator, PromptSource, accuracy_by_category
from megatron_r1reward.evaluation.judged_pair import JudgedPair
from megatron_r1reward.evaluation.result import ORDERS, Counts, ScalarEvaluation
from megatron_r1reward.evaluation.statistics import estimate_share
from megatron_r1reward.judging.ask import Item, all_of
from megatron_r1reward.judging.compare import Votes, of_rewards, rewards_of
from megatron_r1reward.judging.rewards import Rates, Scores, kind_of
from megatron_r1reward.reward.rules import parse_rollout
from megatron_r1reward.types import Preference

log = logging.getLogger(__name__)
_CONCURRENT_PAIRS = 32
_ONE_NUMBER = "a response has one number; asked again, it would be the same"
_NO_TEXT = "it writes no text"
_NO_ORDER = "each response is read alone: there is no order to prefer"
_RATED = "each response is rated once, greedily; `score --votes` and `RewardModel` take the mean of several ratings"
_ABSENT: Final[Mapping[str, tuple[str, str]]] = {  # of a scalar and of a pointwise reward model
    "voting": (_ONE_NUMBER, _RATED),
    "any_correct": (_ONE_NUMBER, _RATED),
    "greedy": (_ONE_NUMBER, _RATED),
    "vote_budget": (_ONE_NUMBER, _RATED),
    "unparsable_rate": (_NO_TEXT, "it is `unrated`, a number of responses"),
    "format_rate": (_NO_TEXT, "a rating is read or it is not: `unrated`"),
    "mean_response_tokens": (_NO_TEXT, "they are `tokens` of `calls`"),
    "transcripts": (_NO_TEXT, "they show verdicts about pairs"),
    "contradiction": ("there is no reasoning that could contradict the verdict", "a rating is no verdict"),
    "answer_1_rate": (_NO_ORDER, _NO_ORDER),
    "pair_kinds": (_NO_ORDER, _NO_ORDER),
}
ABSENT: Final[Mapping[str, Mapping[str, str]]] = {
    kind: {name: reasons[place] for name, reasons in _ABSENT.items()}
    for place, kind in enumerate(("scalar", "pointwise"))
}


@dataclass
class _Scored:
    """What is known of the pairs so far, by their places."""

    right: dict[int, float] = field(default_factory=dict)  # 1, 0, a tie 1/2
    p_right: dict[int, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    tokens: int = 0
    unrated: int = 0

    async def add(self, model: Scores | Rates, place: int, pair: Preference) -> None:
        try:
            item = Item.of(pair.question, pair.image_paths, pair.response_images)
            first, second = await rewards_of(model, item, pair.responses, Votes(), seed=0)
        except (ValueError, RuntimeError) as error:
            self.problems.append(f"{pair.id}: {error}")
            return
        compared = of_rewards(*((first, second) if pair.known_label == 1 else (second, first)))
        self.tokens += first.tokens + second.tokens
        self.unrated += first.unparsable + second.unparsable
        if compared.probability is None:
            self.right[place] = 0.0
            return
        self.right[place] = {1: 1.0, 2: 0.0, None: 0.5}[compared.verdict]
        self.p_right[place] = compared.probability


def sampled_rating_accuracy(
    preferences: Sequence[Preference], pool: Generator, builder: PromptSource, sampling: SamplingSection, *, seed: int
) -> float:
    """Share of the pairs whose better response has the higher of two ratings, one sample of each response; a tie counts
    1/2, and a pair with a response without a rating is not right.

    Args:
        builder: of a pointwise template.

    Raises:
        ValueError: no pair was answered.
    """
    prompts = [builder.build(pair, swapped=swapped) for pair in preferences for swapped in (False, True)]
    said = {
        one.prompt.id: parse_rollout(one).rating for one in pool.generate(prompts, sampling, n=1, seed=seed).rollouts
    }
    right = []
    for first, second in zip(prompts[::2], prompts[1::2], strict=True):
        if first.id in said and second.id in said:
            better, other = (said[one.id] for one in ((first, second) if first.label == 1 else (second, first)))
            right.append(0.0 if better is None or other is None else 0.5 * ((better > other) + (better >= other)))
    if not right:
        raise ValueError(f"none of {len(preferences)} pairs was answered: see the rollout servers' logs")
    return sum(right) / len(right)


def evaluate_scalar(
    model: Scores | Rates,
    run: Callable[[Coroutine[Any, Any, None]], None],
    preferences: Sequence[Preference],
    *,
    seed: int,
    shuffle_images: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> ScalarEvaluation:
    """Score both responses of every pair, a pointwise model greedily.

    A pair of which a request failed is left out, and counted in `Counts.failed`.

    Args:
        run: waits for work on the event loop that `model` belongs to.
        seed: of the shuffle.
        shuffle_images: the control: each pair sees the images of another one.
        progress: called once a pair.

    Raises:
        ValueError: no pair was answered.
    """
    shown = with_shuffled_images(preferences, seed) if shuffle_images else tuple(preferences)
    scored = _Scored()

    async def everything() -> None:
        slots = asyncio.Semaphore(_CONCURRENT_PAIRS)

        async def one(place: int) -> None:
            async with slots:
                await scored.add(model, place, shown[place])
            progress()

        await all_of(one(place) for place in range(len(shown)))

    began = time.monotonic()
    run(everything())
    seconds = time.monotonic() - began
    for problem in scored.problems[:3]:
        log.warning("not scored: %s", problem)
    if not scored.right:
        raise ValueError(f"none of {len(preferences)} pairs was scored, the first: {scored.problems[:1]}")
    places = sorted(scored.right)
    accuracy_P = np.array([scored.right[place] for place in places])
    pairs = [JudgedPair(preference=shown[place], samples={}, labels={}) for place in places]
    found = estimate_share(accuracy_P, [pair.item for pair in pairs])
    error, bins = calibration(np.array(list(scored.p_right.values())))
    counts = Counts(
        pairs=len(pairs),
        samples=2 * len(pairs),
        failed=len(scored.problems),
        without_partner=len(preferences) - len(shown),
    )
    return ScalarEvaluation(
        kind="scalar" if isinstance(model, Scores) else "pointwise",
        accuracy=found.mean,
        interval=found.interval,
        accuracy_by_order=dict.fromkeys(ORDERS, found.mean),
        accuracy_by_order_intervals=dict.fromkeys(ORDERS, found.interval),
        order_consistency=1.0,
        by_category=accuracy_by_category(pairs, accuracy_P),
        counts=counts,
        calibration_error=error,
        calibration=bins,
        calls=counts.samples,
        tokens=scored.tokens,
        unrated=scored.unrated,
        seconds=seconds,
        absent=ABSENT[kind_of(model)],
        shuffled_images=shuffle_images,
    )
