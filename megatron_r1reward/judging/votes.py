"""From judgements of one pair to a probability that the first response is better, and when enough have been asked.

Three ways to count the same judgements (`Aggregator`):

- "majority": every verdict is one vote, whatever the order it was given in.
- "balanced": the share of each order first, then the mean of the two orders. A model that always says "1" ends at 1/2.
- "log_prob": as balanced, but a vote is the probability that the answer token's distribution gives to the first
  response (`Judgement.p_first`); a hard vote where the endpoint does not tell.

Before that, `supported` may leave out votes whose reasoning a consistency judge says does not support them.
A judgement without a verdict does not vote. Shares are smoothed by Jeffreys' prior (half a vote for either side), so
that one vote is not certainty; without any vote the probability is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_r1reward.judging.ask import ORDERS, Judgement, Order
from megatron_r1reward.types import Label

Aggregator = Literal["majority", "balanced", "log_prob"]
_PRIOR = 0.5  # Jeffreys
_TIE = 1e-6  # probabilities this close to a half differ by rounding


@dataclass(frozen=True, kw_only=True)
class VoteCounts:
    """Verdicts by what they say about the caller's order."""

    first: int
    second: int
    unparsable: int

    @property
    def voters(self) -> int:
        return self.first + self.second


def count(judgements: Sequence[Judgement]) -> VoteCounts:
    choices = [judgement.choice for judgement in judgements]
    return VoteCounts(first=choices.count(1), second=choices.count(2), unparsable=choices.count(None))


def vote(judgement: Judgement, *, soft: bool) -> float | None:
    """The share of one vote that goes to the first response, in [0, 1]; None where there is no verdict."""
    if judgement.choice is None:
        return None
    if soft and judgement.p_first is not None:
        return judgement.p_first
    return 1.0 if judgement.choice == 1 else 0.0


def share(judgements: Sequence[Judgement], *, soft: bool, prior: float = _PRIOR) -> float | None:
    """Smoothed share of the votes that go to the first response; None without votes."""
    votes = [value for judgement in judgements if (value := vote(judgement, soft=soft)) is not None]
    return (sum(votes) + prior) / (len(votes) + 2 * prior) if votes else None


def shares_by_order(
    judgements: Sequence[Judgement], *, soft: bool = False, prior: float = _PRIOR
) -> dict[Order, float]:
    """`share` of each order that has votes."""
    by_order = {order: [item for item in judgements if item.order == order] for order in ORDERS}
    found = {order: share(part, soft=soft, prior=prior) for order, part in by_order.items()}
    return {order: value for order, value in found.items() if value is not None}


def probability(judgements: Sequence[Judgement], aggregator: Aggregator, *, prior: float = _PRIOR) -> float | None:
    """Probability in (0, 1) that the caller's first response is better; None when no judgement has a verdict.

    Args:
        prior: votes added to either side; 0 gives the share of the votes itself, in [0, 1].
    """
    if aggregator == "majority":
        return share(judgements, soft=False, prior=prior)
    shares = shares_by_order(judgements, soft=aggregator == "log_prob", prior=prior)
    return sum(shares.values()) / len(shares) if shares else None


def supported(judgements: Sequence[Judgement]) -> tuple[list[Judgement], int]:
    """Judge-filtered votes: those whose reasoning supports them, and how many orders kept votes that it does not.

    A vote that the judge calls inconsistent is left out; one about which it says nothing stays. An order of which no
    vote would be left keeps all of its votes, because the other one alone would also measure a taste for a place.
    """
    kept: list[Judgement] = []
    fallbacks = 0
    for order in ORDERS:
        voters = [item for item in judgements if item.order == order and item.choice is not None]
        left = [item for item in voters if item.consistent is not False]
        fallbacks += len(left) == 0 < len(voters)
        kept += left or voters
    return kept, fallbacks


def verdict(p_first: float | None) -> Label | None:
    """The better response; None for a tie, and without votes."""
    if p_first is None or abs(p_first - 0.5) < _TIE:
        return None
    return 1 if p_first > 0.5 else 2


def orders_agree(judgements: Sequence[Judgement]) -> bool | None:
    """Do the majorities of the two orders prefer the same response? None where an order has no majority."""
    sides = [value - 0.5 for value in shares_by_order(judgements).values()]
    if len(sides) < 2 or 0.0 in sides:
        return None
    return sides[0] * sides[1] > 0


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Sample until the verdict is decided: one judgement per order and round.

    Decided: under Jeffreys' Beta posterior of the votes, the probability that the majority of all future votes falls on
    one side is at least `confidence`. Two judgements that agree decide at the default; orders that disagree do not, so
    pairs that the model is sure of cost two samples and the budget goes to the others.
    """

    confidence: float = 0.9
    max_samples: int = 16  # both orders together

    def __post_init__(self) -> None:
        if not 0.5 < self.confidence < 1 or self.max_samples < 2:
            raise ValueError(
                f"confidence {self.confidence} must be in (0.5, 1), max_samples {self.max_samples} at least 2"
            )

    def decided(self, judgements: Sequence[Judgement]) -> bool:
        votes = count(judgements)
        if votes.voters == 0:
            return False
        from scipy.stats import beta  # takes half a second

        above = float(beta.sf(0.5, votes.first + _PRIOR, votes.second + _PRIOR))
        return max(above, 1.0 - above) >= self.confidence

    def enough(self, judgements: Sequence[Judgement]) -> bool:
        return self.decided(judgements) or len(judgements) + 2 > self.max_samples
