"""What models say that read one response at a time, scalar and pointwise ones; and two of it as a judgement."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from megatron_r1reward.data.prompt import RATINGS
from megatron_r1reward.judging.ask import Asks, Item, Judgement, Order
from megatron_r1reward.judging.votes import verdict
from megatron_r1reward.model_folder.prompt_policy import Kind
from megatron_r1reward.reward.rules import parse_response
from megatron_r1reward.types import Label


@dataclass(frozen=True, kw_only=True)
class Reward:
    """What a scalar or a pointwise reward model says about one response."""

    # Finite: of the head, differences are log-odds of the better response; or the mean of ratings, None without one
    value: float | None
    tokens: int  # read: question, images and response; of a pointwise model: generated
    error: float = 0.0  # standard error of the mean of several ratings
    unparsable: int = 0  # samples without a rating
    texts: tuple[str, ...] = ()  # of a pointwise model, one a sample


@runtime_checkable
class Scores(Protocol):
    """What `compare` and `rank` need of a scalar reward model: `scalar.ScalarClient`."""

    async def reward(self, item: Item, response: str) -> Reward: ...


@runtime_checkable
class Rates(Protocol):
    """What they need of a pointwise reward model: `pointwise.RatingClient`."""

    async def rate(self, item: Item, response: str, *, n: int, temperature: float, seed: int) -> Reward: ...


UNRATED = float(RATINGS[0] - 1)  # the reward of a response without a rating: below every other
AnyModel = Asks | Scores | Rates


def kind_of(model: AnyModel) -> Kind:
    if isinstance(model, Scores):
        return "scalar"
    return "pointwise" if isinstance(model, Rates) else "generative"


def chance(odds: float) -> float:
    """The logistic function: a probability from its log-odds."""
    return 1.0 / (1.0 + math.exp(-odds)) if odds >= 0 else math.exp(odds) / (1.0 + math.exp(odds))


def first_wins(first: Reward, second: Reward) -> float | None:
    """Bradley and Terry's: the difference of two rewards is the log-odds of the first response. Of ratings that is a
    convention: nothing has fitted it. None: one of the two has no rating."""
    if first.value is None or second.value is None:
        return None
    return chance(first.value - second.value)


def judged_rewards(first: Reward, second: Reward, order: Order) -> Judgement:
    """The rewards of the caller's responses as a judgement; `read_rewards` reads its text."""
    p = first_wins(first, second)
    shown = (first, second) if order == "12" else (second, first)
    said = {"rewards": [one.value for one in shown], "tokens": [one.tokens for one in shown]}
    texts = {"texts": [one.texts for one in shown]} if first.texts else {}
    reasonings = [parse_response(one.texts[0]).reasoning for one in shown if one.texts]
    return Judgement(
        order=order,
        choice=verdict(p),
        p_first=p,
        text=json.dumps(said | texts, ensure_ascii=False),
        reasoning="\n\n".join(f"Response {place}: {text}" for place, text in enumerate(reasonings, 1)),
        tokens=first.tokens + second.tokens if first.texts else 0,
        finish_reason="scored",
    )


def read_rewards(text: str) -> Label | None:
    """The verdict of a judgement that `judged_rewards` made, as its responses were shown; None: a tie, or no
    reward."""
    try:
        first, second = json.loads(text)["rewards"]
        return verdict(chance(first - second))
    except (ValueError, KeyError, TypeError):
        return None
