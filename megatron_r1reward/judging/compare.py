"""Which of two responses is better: both orders, several samples, one probability; or two rewards, one probability."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

from megatron_r1reward.judging.ask import ORDERS, Asks, Item, Judgement, Order, all_of
from megatron_r1reward.judging.rewards import AnyModel, Rates, Reward, Scores, first_wins, judged_rewards, kind_of
from megatron_r1reward.judging.votes import (
    Adaptive,
    Aggregator,
    VoteCounts,
    count,
    orders_agree,
    probability,
    verdict,
)
from megatron_r1reward.model_folder.prompt_policy import Kind, PromptPolicy
from megatron_r1reward.types import Label


@dataclass(frozen=True, kw_only=True)
class Votes:
    """How many judgements a comparison asks for, and how they are counted.

    Args:
        samples: per order; with `adaptive` ignored.
        both_orders: ask with the responses exchanged, too. One order alone measures the model's taste for a place as
            well as its judgement.
        temperature: None is greedy for a single sample and 1 for several, which greedy decoding would make copies.
        adaptive: stop as soon as the verdict is decided.
    """

    samples: int = 1
    both_orders: bool = True
    temperature: float | None = None
    aggregator: Aggregator = "log_prob"
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples {self.samples}: ask for at least one")
        if self.adaptive is not None and not self.both_orders:
            raise ValueError("adaptive sampling alternates between the two orders: leave both_orders on")

    @property
    def orders(self) -> tuple[Order, ...]:
        return ORDERS if self.both_orders else ORDERS[:1]

    @property
    def sampling_temperature(self) -> float:
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.samples == 1 and self.adaptive is None else 1.0

    @property
    def way(self) -> str | None:
        """The name of this way of voting in calibrations; None for one that is never calibrated."""
        if not self.both_orders:
            return None
        if self.adaptive is not None:
            usual = self.adaptive.max_samples == Adaptive().max_samples and self.sampling_temperature == 1.0
            return f"adaptive {self.adaptive.confidence:g}" if usual else None
        if self.sampling_temperature == 0.0:
            return "greedy"
        return str(self.samples) if self.sampling_temperature == 1.0 else None

    def check_kind(self, kind: Kind) -> None:
        """Raises ValueError where something is said that a model has not which reads one response at a time; orders and
        ways to count change nothing there."""
        if kind == "pointwise" and self.adaptive is not None:
            raise ValueError(
                "votes: adaptive sampling decides between two responses, and a pointwise reward model rates each: give "
                "a number of votes, whose mean is taken"
            )
        if kind != "scalar":
            return
        if self.samples > 1 or self.adaptive is not None or self.temperature is not None:
            raise ValueError(
                "votes: a scalar reward model gives each response one number, and more votes would be copies of it: "
                "leave votes at 1, without a temperature and without adaptive sampling"
            )

    @property
    def calls(self) -> int:
        """Judgements that one comparison costs, at most."""
        return self.samples * len(self.orders) if self.adaptive is None else self.adaptive.max_samples


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the model says about two responses; 1 is the caller's first.

    Of a scalar or pointwise reward model: one judgement, whose text holds the two rewards; it has no orders to disagree
    in.
    """

    verdict: Label | None  # None: a tie, or no judgement could be read
    probability: float | None  # that the first response is better; None: no judgement could be read
    calibrated: float | None  # as measured on held-out pairs; None: the folder has no calibration of such votes
    share: float | None  # of the votes for the first response, without the prior that `probability` has
    counts: VoteCounts
    orders_agree: bool | None  # None: only one order was asked, or an order has no majority
    judgements: tuple[Judgement, ...]

    @property
    def reasoning(self) -> str:
        """Of a judgement that agrees with the verdict; of the first one where none does."""
        agreeing = [item for item in self.judgements if item.choice is not None and item.choice == self.verdict]
        return (agreeing or list(self.judgements))[0].reasoning

    @property
    def tokens(self) -> int:
        """Generated, over all judgements."""
        return sum(judgement.tokens for judgement in self.judgements)

    def _repr_html_(self) -> str:
        """How a notebook shows it: the verdict, and every judgement with its reasoning."""
        verdict = "no verdict" if self.verdict is None else f"response {self.verdict} is better"
        p = "unknown" if self.probability is None else f"{self.probability:.1%}"
        shown = {"12": "as given", "21": "exchanged"}
        rows = [(shown[item.order], item.choice or "-", item.reasoning or item.text) for item in self.judgements]
        title = f"{verdict}; probability that response 1 is: {p}"
        return html_table(title, ("responses shown", "better", "reasoning"), rows)


def html_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Texts of a model are shown as texts, whatever they hold."""

    def line(cells: Sequence[object], tag: str) -> str:
        return (
            "<tr>" + "".join(f"<{tag} style='text-align: left'>{escape(str(one))}</{tag}>" for one in cells) + "</tr>"
        )

    body = "".join(line(row, "td") for row in rows)
    return f"<table><caption>{escape(title)}</caption>{line(header, 'th')}{body}</table>"


async def compare(
    model: AnyModel,
    item: Item,
    responses: tuple[str, str],
    votes: Votes,
    *,
    seed: int = 0,
    policy: PromptPolicy | None = None,
) -> Comparison:
    """Ask for judgements of `responses` and count them; of a model that reads one response, for their two rewards.

    Args:
        policy: of the model's folder, for its calibration.

    Raises:
        ValueError: `votes` mean nothing to a model of this kind.
        ModelRefusedError, ModelUnavailableError: see `ModelClient.judge`.
    """
    votes.check_kind(kind_of(model))
    if isinstance(model, Scores | Rates):
        return of_rewards(*await rewards_of(model, item, responses, votes, seed=seed))
    if votes.adaptive is None:
        samples = [(order, votes.samples) for order in votes.orders]
        judgements = await _ask(model, item, responses, samples, votes, seed)
    else:
        judgements = []
        while not votes.adaptive.enough(judgements):
            once_each: list[tuple[Order, int]] = [(order, 1) for order in votes.orders]
            judgements += await _ask(model, item, responses, once_each, votes, seed + len(judgements))
    found = summarise(judgements, votes.aggregator)
    if policy is None:
        return found
    p = policy.calibrated(found.probability, aggregator=votes.aggregator, votes=votes.way)
    return replace(found, calibrated=p)


async def rewards_of(
    model: Scores | Rates, item: Item, responses: tuple[str, str], votes: Votes, *, seed: int
) -> tuple[Reward, Reward]:
    """Of both responses; raises as `reward_of`."""
    first, second = await all_of(
        reward_of(model, item.alone(place), one, votes, seed=seed) for place, one in enumerate(responses)
    )
    return first, second


async def reward_of(model: Scores | Rates, item: Item, response: str, votes: Votes, *, seed: int) -> Reward:
    """Of one response; of a pointwise model the mean of `votes.samples` ratings. Raises as the model's client."""
    if isinstance(model, Scores):
        return await model.reward(item, response)
    seed = seed_of(seed, item, (response, ""), ORDERS[0])
    return await model.rate(item, response, n=votes.samples, temperature=votes.sampling_temperature, seed=seed)


def of_rewards(first: Reward, second: Reward) -> Comparison:
    """See `first_wins`. A response without a rating leaves no verdict."""
    p = first_wins(first, second)
    said = judged_rewards(first, second, ORDERS[0])
    decided = said.choice is not None
    return Comparison(
        verdict=said.choice,
        probability=p,
        calibrated=None,
        share=p,
        counts=VoteCounts(first=int(said.choice == 1), second=int(said.choice == 2), unparsable=int(p is None)),
        orders_agree=True if decided else None,
        judgements=(said,),
    )


def summarise(judgements: list[Judgement], aggregator: Aggregator) -> Comparison:
    """Count judgements of one pair; at least one."""
    p_first = probability(judgements, aggregator)
    return Comparison(
        verdict=verdict(p_first),
        probability=p_first,
        calibrated=None,
        share=probability(judgements, aggregator, prior=0.0),
        counts=count(judgements),
        orders_agree=orders_agree(judgements),
        judgements=tuple(judgements),
    )


async def _ask(
    model: Asks,
    item: Item,
    responses: tuple[str, str],
    samples: list[tuple[Order, int]],
    votes: Votes,
    seed: int,
) -> list[Judgement]:
    parts = await all_of(
        model.judge(
            item,
            responses,
            order=order,
            n=n,
            temperature=votes.sampling_temperature,
            seed=seed_of(seed, item, responses, order),
        )
        for order, n in samples
    )
    return [judgement for part in parts for judgement in part]


def seed_of(seed: int, item: Item, responses: tuple[str, str], order: Order) -> int:
    """A seed of 31 bits that depends on what is asked, so that a repeated run asks for the same samples."""
    shown = "\0".join((str(seed), item.key, *responses, order))
    return int.from_bytes(hashlib.blake2b(shown.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big") >> 1
