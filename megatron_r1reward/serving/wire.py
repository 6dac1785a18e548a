"""What the service takes and gives, as JSON; every limit and every refusal of a request is here.

Refused with one clear 422: too many or too large parts, images that are no pictures or lie outside the roots, addresses
on the network, and texts that imitate the prompt's own marks, which would let a response speak for its judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from megatron_r1reward.judging.ask import Item, image_url
from megatron_r1reward.judging.compare import Comparison, Votes
from megatron_r1reward.judging.rank import Ranking, Schedule
from megatron_r1reward.judging.votes import Adaptive, Aggregator
from megatron_r1reward.model_folder.prompt_policy import Kind
from megatron_r1reward.types import Label

# The prompt's headings, the tags of an answer, and special tokens of the chat format.
_MARKS = re.compile(
    r"#{4,6}\s*\**\s*\[?\s*(?:Question|Response\s*[12]|Input|Output Format)\b|<\s*/?\s*answer\s*>|<\|[a-z_]+\|>",
    re.IGNORECASE,
)

_SURROGATES = re.compile(r"[\ud800-\udfff]")
_UNSEEN = re.compile(r"[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]")


class RefusedError(ValueError):
    """This request cannot be served as it is; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 64 << 20
    text_characters: int = 100_000  # of one text; longer ones would not fit into the model's context anyway
    images: int = 16
    image_pixels: int = 50_000_000
    candidates: int = 64
    votes: int = 64  # judgements per pair and order
    judgements: int = 4096  # of one request
    batch: int = 64  # tasks of one batch
    image_roots: tuple[Path, ...] = ()  # folders that image paths may be in; none: only data URLs


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class HowToAsk(_Strict):
    """How many judgements are made of a pair, and how they are counted."""

    votes: Annotated[int, Field(ge=1, description="judgements per pair and order; 1 is greedy")] = 1
    both_orders: Annotated[bool, Field(description="ask with the responses exchanged, too")] = True
    aggregator: Aggregator = "log_prob"
    adaptive: Annotated[bool, Field(description="sample until the verdict is decided, `votes` being the most")] = False
    seed: Annotated[int, Field(ge=0)] = 0

    def as_votes(self) -> Votes:
        adaptive = Adaptive(max_samples=2 * self.votes) if self.adaptive else None
        samples = 1 if self.adaptive else self.votes
        return Votes(samples=samples, both_orders=self.both_orders, aggregator=self.aggregator, adaptive=adaptive)


class CompareRequest(HowToAsk):
    """Which of two responses is better?"""

    question: str
    responses: Annotated[list[str], Field(min_length=2, max_length=2)]
    images: Annotated[list[str], Field(description="data URLs, or paths under the service's image roots")] = []


class RankRequest(HowToAsk):
    """The order of several responses, with a reward for each."""

    question: str
    responses: Annotated[list[str], Field(min_length=1, description="at least two; of a model that scores each, one")]
    images: Annotated[list[str], Field(description="data URLs, or paths under the service's image roots")] = []
    schedule: Schedule = "swiss"
    rounds: Annotated[int, Field(ge=1)] | None = None
    budget: Annotated[int, Field(ge=1, description="judgements at most")] | None = None


class BatchTask(_Strict):
    compare: CompareRequest | None = None
    rank: RankRequest | None = None


class BatchRequest(_Strict):
    """Several tasks; the answers come in the same order."""

    tasks: Annotated[list[BatchTask], Field(min_length=1)]


class OneJudgement(BaseModel):
    order: Literal["12", "21"]
    choice: Label | None
    p_first: float | None
    reasoning: str
    text: str
    tokens: int


class CompareAnswer(BaseModel):
    verdict: Annotated[Label | None, Field(description="the better response; null: a tie, or nothing could be read")]
    probability: Annotated[float | None, Field(description="that the first response is better")]
    calibrated: Annotated[float | None, Field(description="the same, right as often as it says; null: not calibrated")]
    first: int
    second: int
    unparsable: int
    orders_agree: bool | None
    judgements: list[OneJudgement]


class OneComparison(CompareAnswer):
    pair: tuple[int, int]


class RankAnswer(BaseModel):
    kind: Kind
    order: list[int]
    rewards: Annotated[
        list[float],
        Field(
            description="mean probability of winning; of a scalar reward model its value, of a pointwise one ratings"
        ),
    ]
    strengths: list[float]
    standard_errors: list[float]
    confidence: float
    calls: int
    ties: int
    unparsable: int
    cycles: int
    comparisons: list[OneComparison]


class ScoreAnswer(BaseModel):
    rewards: list[float]


class BatchAnswer(BaseModel):
    results: list[CompareAnswer | RankAnswer | dict[str, str]]


def compare_answer(comparison: Comparison) -> dict[str, Any]:
    judgements = [{name: getattr(item, name) for name in OneJudgement.model_fields} for item in comparison.judgements]
    return {
        "verdict": comparison.verdict,
        "probability": comparison.probability,
        "calibrated": comparison.calibrated,
        "first": comparison.counts.first,
        "second": comparison.counts.second,
        "unparsable": comparison.counts.unparsable,
        "orders_agree": comparison.orders_agree,
        "judgements": judgements,
    }


def rank_answer(ranking: Ranking) -> dict[str, Any]:
    plain = ("kind", "confidence", "calls", "ties", "unparsable", "cycles")
    lists = ("order", "rewards", "strengths", "standard_errors")
    pairs = [{"pair": pair, **compare_answer(comparison)} for pair, comparison in ranking.comparisons.items()]
    return {
        **{name: list(getattr(ranking, name)) for name in lists},
        **{name: getattr(ranking, name) for name in plain},
        "comparisons": pairs,
    }


def checked_item(request: CompareRequest | RankRequest, limits: Limits) -> Item:
    """The question with its images; the whole request is checked against the limits.

    Raises:
        RefusedError: see the head of this module.
    """
    check_texts(request.responses, limits)
    if len(request.responses) > limits.candidates:
        raise RefusedError(f"{len(request.responses)} responses, at most {limits.candidates} are ranked at once")
    if request.votes > limits.votes:
        raise RefusedError(f"{request.votes} votes, at most {limits.votes} are made of a pair and order")
    check_judgements([request], limits)
    return check_item(request.question, request.images, limits)


def check_item(question: str, images: Sequence[str], limits: Limits) -> Item:
    """The question with its images, or RefusedError."""
    check_texts([question], limits)
    if len(images) > limits.images:
        raise RefusedError(f"{len(images)} images, at most {limits.images} are taken")
    return Item(question=question, images=tuple(_image(image, limits) for image in images))


def check_judgements(requests: Sequence[CompareRequest | RankRequest], limits: Limits) -> None:
    """Raises RefusedError when all of these together would cost more than one request may."""
    pairs = [1 if isinstance(request, CompareRequest) else _pairs(request) for request in requests]
    judgements = sum(n * request.as_votes().calls for n, request in zip(pairs, requests, strict=True))
    if judgements > limits.judgements:
        raise RefusedError(f"up to {judgements} judgements, at most {limits.judgements} are made for one request")


def _pairs(request: RankRequest) -> int:
    count = len(request.responses)
    every = count * (count - 1) // 2
    if request.budget is not None:
        return min(every, max(1, request.budget // request.as_votes().calls))
    rounds = request.rounds or max(1, (count - 1).bit_length())
    return {"all_pairs": every, "swiss": min(every, rounds * (count // 2))}.get(request.schedule, count)


def check_texts(texts: Sequence[str], limits: Limits) -> None:
    """Raises RefusedError for what no prompt may hold."""
    for text in texts:
        if len(text) > limits.text_characters:
            raise RefusedError(f"a text of {len(text)} characters, at most {limits.text_characters} are taken")
        if lone := _SURROGATES.search(text):
            raise RefusedError(f"a text holds {lone.group()!a}, half of a character: send valid Unicode")
        if mark := _MARKS.search(_plain(text)):
            raise RefusedError(
                f"a text holds {mark.group()!r}, which the prompt uses itself: a response could speak for its judge. "
                "Remove or rewrite it"
            )


def _plain(text: str) -> str:
    """As a reader sees it: full-width letters as plain ones, nothing that is not shown."""
    if text.isascii():
        return text
    return _UNSEEN.sub("", unicodedata.normalize("NFKC", text))


def _image(image: str, limits: Limits) -> str:
    if not image.startswith("data:") and "://" not in image:
        path = _inside(image, limits.image_roots)
        return _url(path, limits)
    return _url(image, limits)


def _url(image: str | Path, limits: Limits) -> str:
    try:
        return image_url(image, max_pixels=limits.image_pixels)
    except ValueError as error:
        raise RefusedError(str(error)) from error


def _inside(image: str, roots: Sequence[Path]) -> Path:
    """The file below one of the roots, links and `..` resolved. One message for what is missing and what is outside:
    a caller must not learn which files exist elsewhere."""
    if not roots:
        raise RefusedError("image paths are not taken here: send the image as a data URL")
    for root in roots:
        try:
            path = (root / image).resolve()
            if path.is_relative_to(root.resolve()) and path.is_file():
                return path
        except (OSError, ValueError, RuntimeError):  # a name that no file can have, a loop of links
            continue
    raise RefusedError(f"image {image[:200]!r} is not a file below this service's image roots")
