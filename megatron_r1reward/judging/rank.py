"""From pairs to rewards: which pairs of N candidates are compared, and what number each candidate gets.

    candidates --schedule--> pairs of a round --compare, concurrently--> wins --Bradley-Terry--> strengths, rewards

A scalar or pointwise reward model needs no pairs: N candidates are N calls, and their rewards are the strengths
(`_rank_rewards`).

A schedule proposes pairs round by round from what is known so far. Whatever was asked, cycles and ties included, the
strengths are the maximum a posteriori of a Bradley-Terry model whose prior keeps candidates that never lost finite;
their covariance (Laplace) says how sure that is. Rewards are mean win probabilities against the other candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_r1reward.judging.ask import Item, all_of
from megatron_r1reward.judging.compare import Comparison, Votes, compare, html_table, of_rewards, reward_of
from megatron_r1reward.judging.rewards import UNRATED, AnyModel, Rates, Scores, kind_of
from megatron_r1reward.model_folder.prompt_policy import Kind

Schedule = Literal["swiss", "all_pairs", "knockout", "circular", "pivot"]
SCHEDULES: Final = get_args(Schedule)
Pair = tuple[int, int]
Floats = NDArray[np.float64]
_PRIOR_VARIANCE = 4.0  # of a strength: two candidates at one standard deviation each differ by 4, odds of 55 to 1
_DRAWS = 4096  # of the posterior, for the confidence in the winner


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """N candidates in order of their strength. Arrays are indexed like the caller's candidates."""

    order: tuple[int, ...]  # indices, the best first
    # Mean probability of winning against another candidate, in (0, 1), their mean 1/2; of a scalar reward model the
    # values of its head, of a pointwise one mean ratings (0: none could be read), which depend on no other candidate
    rewards: tuple[float, ...]
    strengths: tuple[float, ...]  # Bradley-Terry, in log-odds, mean 0
    # Of the strengths; of mean ratings over several votes; 0 where one number is all there is
    standard_errors: tuple[float, ...]
    confidence: float  # posterior probability that order[0] is the strongest
    comparisons: Mapping[Pair, Comparison]  # by indices (i, j): i was the first response
    calls: int  # judgements; of a scalar reward model: responses that it read; of a pointwise one: ratings
    ties: int  # comparisons without a verdict though votes exist
    unparsable: int  # judgements without a verdict, or a rating
    cycles: int  # triples a over b over c over a
    kind: Kind = "generative"
    tokens: int = 0  # generated; of a scalar reward model: read

    @property
    def best(self) -> int:
        return self.order[0]

    def _repr_html_(self) -> str:
        """How a notebook shows it: the candidates by their indices, the best first."""
        rows = [
            (
                place,
                index,
                f"{self.rewards[index]:.3f}",
                f"{self.strengths[index]:+.2f} ± {self.standard_errors[index]:.2f}",
            )
            for place, index in enumerate(self.order, 1)
        ]
        title = f"sure of the best: {self.confidence:.1%}; {self.calls} judgements"
        return html_table(title, ("place", "candidate", "reward", "strength"), rows)


def rounds_of(
    schedule: Schedule, wins: Floats, *, rounds: int | None, generator: np.random.Generator
) -> Iterator[list[Pair]]:
    """The pairs of each round of a schedule.

    Args:
        wins: [N, N], wins[i, j] of i over j; read again before each round, so the caller enters results meanwhile.
    """
    everybody = range(len(wins))
    if schedule == "all_pairs":
        yield list(combinations(everybody, 2))
    elif schedule == "circular":
        yield sorted({_pair(i, (i + 1) % len(wins)) for i in everybody})
    elif schedule == "pivot":
        pivot = int(generator.integers(len(wins)))
        yield [_pair(i, pivot) for i in everybody if i != pivot]
    elif schedule == "knockout":
        alive = [int(i) for i in generator.permutation(len(wins))]
        while len(alive) > 1:
            matches = list(zip(alive[::2], alive[1::2], strict=False))
            yield [_pair(*match) for match in matches]
            rested = alive[2 * len(matches) :]
            alive = [i if wins[i, j] >= wins[j, i] else j for i, j in matches] + rested
    else:
        seats = [int(i) for i in generator.permutation(len(wins))]
        for _ in range(math.ceil(math.log2(len(wins))) if rounds is None else rounds):
            yield swiss_round(wins, seats)


def _pair(i: int, j: int) -> Pair:
    return (min(i, j), max(i, j))


def swiss_round(wins: Floats, seats: Sequence[int]) -> list[Pair]:
    """Neighbours in the table that have not met, from the top down; the last without a partner sits out.

    Args:
        wins: [N, N], soft counts.
        seats: order among equals.
    """
    met = wins + wins.T > 0
    table = sorted(seats, key=lambda i: -float(wins[i].sum()))
    pairs: list[Pair] = []
    while table:
        first = table.pop(0)
        partner = next((other for other in table if not met[first, other]), None)
        if partner is not None:
            table.remove(partner)
            pairs.append(_pair(first, partner))
    return pairs


def fit_strengths(wins: Floats) -> tuple[Floats, Floats]:
    """Bradley-Terry strengths and their covariance.

    Args:
        wins: float64 [N, N], votes of i over j; fractions are shares of a vote.

    Returns:
        (strengths [N] with mean 0, covariance [N, N]), under independent normal priors of variance 4.
    """
    from sklearn.linear_model import LogisticRegression  # takes a second to import

    size = len(wins)
    winners, losers = np.nonzero(wins)
    if winners.size == 0:
        return np.zeros(size), np.eye(size) * _PRIOR_VARIANCE
    identity = np.eye(size)
    differences = identity[winners] - identity[losers]  # [M, N]
    weights = wins[winners, losers]
    # Each win also as the loser's defeat, half a weight each: the same likelihood, with both outcomes present.
    model = LogisticRegression(C=_PRIOR_VARIANCE, fit_intercept=False, tol=1e-8, max_iter=1000)
    model.fit(
        np.concatenate([differences, -differences]),
        np.repeat([1, 0], len(differences)),
        sample_weight=np.concatenate([weights, weights]) / 2,
    )
    strengths = model.coef_[0]
    odds = 1.0 / (1.0 + np.exp(-(differences @ strengths)))
    information = (differences * (weights * odds * (1 - odds))[:, None]).T @ differences
    covariance = np.linalg.inv(information + identity / _PRIOR_VARIANCE)
    return strengths - strengths.mean(), covariance


async def rank(
    model: AnyModel,
    item: Item,
    candidates: Sequence[str],
    votes: Votes,
    *,
    schedule: Schedule = "swiss",
    rounds: int | None = None,
    budget: int | None = None,
    seed: int = 0,
) -> Ranking:
    """Compare candidates by a schedule and rank them. Candidates with equal text are one candidate. A scalar or
    pointwise reward model scores each, whatever the schedule is.

    Args:
        rounds: of the Swiss system; None: log2 of the number of candidates, rounded up.
        budget: judgements at most; a round that would exceed it is cut, later ones are not played. None: no limit.
        seed: of seats, pivot and samples.

    Raises:
        ValueError: fewer than two candidates (one that scores each: none), a budget below one comparison, or votes,
            rounds or a budget that mean nothing to a model of this kind.
        ModelRefusedError, ModelUnavailableError: see `ModelClient.judge`.
    """
    votes.check_kind(kind := kind_of(model))
    if isinstance(model, Scores | Rates):
        for name, given in (("rounds", rounds), ("budget", budget)):
            if given is not None:
                raise ValueError(
                    f"{name} {given}: a {kind} reward model compares no pairs, N candidates cost N calls: leave it out"
                )
        return await _rank_rewards(model, item, candidates, votes, seed)
    if len(candidates) < 2:
        raise ValueError(f"{len(candidates)} candidates: a model that compares needs at least two")
    if budget is not None and budget < votes.calls:
        raise ValueError(f"budget {budget} does not pay for one comparison, which costs up to {votes.calls} judgements")
    texts = list(dict.fromkeys(candidates))  # the distinct ones, in order
    wins = np.zeros((len(texts), len(texts)))
    met: dict[Pair, Comparison] = {}
    spent = 0
    generator = np.random.default_rng(seed)
    for proposed in rounds_of(schedule, wins, rounds=rounds, generator=generator) if len(texts) > 1 else ():
        pairs = [pair for pair in proposed if pair not in met]
        if budget is not None:
            pairs = pairs[: (budget - spent) // votes.calls]
        if not pairs:
            break
        played = await all_of(compare(model, item, (texts[i], texts[j]), votes, seed=seed) for i, j in pairs)
        for (i, j), comparison in zip(pairs, played, strict=True):
            met[i, j] = comparison
            spent += len(comparison.judgements)
            add_votes(wins, i, j, comparison)
    return _ranking(candidates, texts, wins, met, generator)


async def _rank_rewards(
    model: Scores | Rates, item: Item, candidates: Sequence[str], votes: Votes, seed: int
) -> Ranking:
    """By the value of each. The comparisons are those of neighbours in the order, which follow from it; the confidence
    is the best one's share in Luce's choice among all, with two candidates the probability of the better one."""
    if not candidates:
        raise ValueError("no candidates: give at least one")
    texts = list(dict.fromkeys(candidates))
    found = await all_of(reward_of(model, item, text, votes, seed=seed) for text in texts)
    values = np.array([UNRATED if one.value is None else one.value for one in found])
    order = [int(index) for index in np.argsort(-values, kind="stable")]
    place = {text: index for index, text in enumerate(texts)}
    where = [place[text] for text in candidates]
    own = values[where]
    first_seen = {index: candidates.index(text) for index, text in enumerate(texts)}
    pairs = sorted(_pair(i, j) for i, j in pairwise(order))
    met = {(first_seen[i], first_seen[j]): of_rewards(found[i], found[j]) for i, j in pairs}
    return Ranking(
        order=tuple(int(index) for index in np.argsort(-own, kind="stable")),
        rewards=tuple(map(float, own)),
        strengths=tuple(map(float, own - own.mean())),
        standard_errors=tuple(found[index].error for index in where),
        confidence=float(1.0 / np.exp(values - values.max()).sum()),
        comparisons=met,
        calls=len(texts) * votes.samples,
        ties=sum(one.verdict is None and one.probability is not None for one in met.values()),
        unparsable=sum(one.unparsable for one in found),
        cycles=0,
        kind=kind_of(model),
        tokens=sum(one.tokens for one in found),
    )


def add_votes(wins: Floats, i: int, j: int, comparison: Comparison) -> None:
    """Enter the votes of a comparison of i (first) and j, split as its share says. Without votes nothing."""
    if comparison.share is not None:
        voters = comparison.counts.voters
        wins[i, j] += voters * comparison.share
        wins[j, i] += voters * (1 - comparison.share)


def _ranking(
    candidates: Sequence[str],
    texts: Sequence[str],
    wins: Floats,
    met: Mapping[Pair, Comparison],
    generator: np.random.Generator,
) -> Ranking:
    strengths, covariance = fit_strengths(wins)
    place = {text: index for index, text in enumerate(texts)}
    where = [place[text] for text in candidates]
    own, errors = strengths[where], np.sqrt(np.diag(covariance))[where]
    draws = generator.multivariate_normal(strengths, covariance, size=_DRAWS)
    best = int(np.argmax(strengths))
    first_seen = {index: where.index(index) for index in range(len(texts))}
    chance = 1.0 / (1.0 + np.exp(-(own[:, None] - own[None, :])))  # [N, N], 1/2 on the diagonal
    return Ranking(
        order=tuple(int(index) for index in np.argsort(-own, kind="stable")),
        rewards=tuple(float(row) for row in (chance.sum(axis=1) - 0.5) / (len(own) - 1)),
        strengths=tuple(map(float, own)),
        standard_errors=tuple(map(float, errors)),
        confidence=float(np.mean(np.argmax(draws, axis=1) == best)),
        comparisons={(first_seen[i], first_seen[j]): comparison for (i, j), comparison in met.items()},
        calls=sum(len(comparison.judgements) for comparison in met.values()),
        ties=sum(item.verdict is None and item.probability is not None for item in met.values()),
        unparsable=sum(item.counts.unparsable for item in met.values()),
        cycles=_cycles(wins),
        tokens=sum(comparison.tokens for comparison in met.values()),
    )


def _cycles(wins: Floats) -> int:
    """Triples of candidates that beat each other in a circle."""
    beats = (wins > wins.T).astype(np.int64)
    return int(np.trace(beats @ beats @ beats)) // 3
