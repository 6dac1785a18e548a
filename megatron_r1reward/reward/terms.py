"""The terms that a reward is the sum of: the rules' own, agreement with oneself, and functions of the user's.

[reward]                                             # rewards.py
terms = [                                            def brevity(rows: list[TermInput]) -> list[float]:
  {name = "format", weight = 0.5},                       return [-row.tokens / 1000 for row in rows]
  {name = "result"},
  {name = "brevity", function = "rewards.py:brevity"},
]
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeVar

from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.reward.rules import ParsedResponse
from megatron_r1reward.types import JudgeVerdict, Label, Preference, Prompt, Rollout, ScoredRollout
from megatron_r1reward.user_parts import Part, PartError, failure, load_function, read_part

SaidT = TypeVar("SaidT", int, Label)


@dataclass(frozen=True, kw_only=True)
class TermInput:
    """One response, as a user's function sees it."""

    text: str  # without special tokens
    reasoning: str  # before <answer>, without think tags
    answer: Label | None  # as the parser read it; None of a pointwise prompt
    label: Label | None  # in the order shown (of a pointwise prompt 1: it is the better one); None: the pair has none
    well_formed: bool
    finish_reason: str  # "stop" | "length"
    tokens: int
    verdict: JudgeVerdict  # of the consistency judge
    agreement: float | None  # share of the other order's samples that agree; None: not measured
    question: str
    responses: tuple[str, str]  # in the order shown
    swapped: bool
    image_paths: tuple[str, ...]
    metadata: Mapping[str, str]  # of the row: category, source
    row_id: str  # `id` of the row
    prompt_id: str  # samples of one prompt have the same
    sample: int
    rating: int | None = None  # of a pointwise prompt, which shows the first of `responses` alone

    @property
    def name(self) -> str:
        return f"row {self.row_id!r} (prompt {self.prompt_id!r}, sample {self.sample})"


@dataclass(frozen=True)
class TermFunctions:
    """The user's functions among a reward's terms, by the names of their terms; loaded once.

    Raises:
        ValueError: a file cannot be read, does not run, or lacks its function.
    """

    parts: Mapping[str, Part] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, section: RewardSection) -> TermFunctions:
        parts = function_parts(section)
        return cls(parts, {name: load_function(part) for name, part in parts.items()})

    def values(self, rows: Sequence[TermInput]) -> dict[str, list[float]]:
        """Each function's values of all rows, by the names of the terms.

        Raises:
            PartError: a function raises, or returns anything but one finite number per row.
        """
        return {name: _values(self.parts[name], function, rows) for name, function in self.functions.items()}


def function_parts(section: RewardSection) -> dict[str, Part]:
    """The files of the reward's functions, by the names of their terms.

    Raises:
        ValueError: one cannot be read.
    """
    named = {term.name: term.function for term in section.all_terms if term.function is not None}
    return {name: read_part(f"reward.terms {name!r}", function) for name, function in named.items()}


def _values(part: Part, function: Callable[..., Any], rows: Sequence[TermInput]) -> list[float]:
    if not rows:
        return []
    try:
        returned = function(list(rows))
    except Exception as error:
        place, cause = _first_failure(function, rows) or (f"a batch of {len(rows)} rows", error)
        raise failure(part, place, cause) from error
    if callable(tolist := getattr(returned, "tolist", None)):  # an array, a tensor
        returned = tolist()
    fix = f"return a list of {len(rows)} numbers, one per row"
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise PartError(f"{part.key} {part.name!r} returned {_short(returned)} for {len(rows)} rows: {fix}")
    if len(returned) != len(rows):
        raise PartError(f"{part.key} {part.name!r} returned {len(returned)} values for {len(rows)} rows: {fix}")
    for value, row in zip(returned, rows, strict=True):
        if not isinstance(value, Real) or not math.isfinite(value):
            said = f"{part.key} {part.name!r} returned {_short(value)} for {row.name}"
            raise PartError(f"{said}: return a finite number for every row")
    return [float(value) for value in returned]


def _first_failure(function: Callable[..., Any], rows: Sequence[TermInput]) -> tuple[str, Exception] | None:
    """The first row at which the function fails alone; None: it fails at a batch only."""
    for row in rows:
        try:
            function([row])
        except Exception as error:
            return row.name, error
    return None


def _short(value: object) -> str:
    return " ".join(repr(value).split())[:80]


def term_input(
    rollout: Rollout,
    parsed: ParsedResponse,
    *,
    verdict: JudgeVerdict,
    agreement: float | None,
    preference: Preference | None,
) -> TermInput:
    """`preference`: the row that the rollout answers; None: it is not known, and its texts are empty."""
    prompt = rollout.prompt
    shown = ("", "") if preference is None else preference.responses
    return TermInput(
        text=rollout.text,
        reasoning=parsed.reasoning,
        answer=parsed.answer,
        label=prompt.label,
        well_formed=parsed.well_formed,
        finish_reason=rollout.finish_reason,
        tokens=len(rollout.token_ids),
        verdict=verdict,
        agreement=agreement,
        question="" if preference is None else preference.question,
        responses=(shown[1], shown[0]) if prompt.swapped else shown,
        swapped=prompt.swapped,
        image_paths=prompt.image_paths,
        metadata={} if preference is None else preference.metadata,
        row_id=prompt.preference_id,
        prompt_id=prompt.id,
        sample=rollout.sample_index,
        rating=parsed.rating,
    )


def agreements(
    prompts: Sequence[Prompt], answers: Sequence[Label | None], left_out: Sequence[bool]
) -> list[float | None]:
    """Of each response, the share of the responses to the other order of its pair whose answer names the same response.

    A response without an answer agrees with nothing, and nothing agrees with it. `left_out` are part of no share. None:
    the other order has no response, because its prompt failed.
    """
    named = [as_stored(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return _shares(prompts, named, left_out, lambda prompt, mine, other: mine == other)


def orderings(prompts: Sequence[Prompt], ratings: Sequence[int | None], left_out: Sequence[bool]) -> list[float | None]:
    """A of pointwise prompts: of each response, the share of the ratings of the other response of its pair that its own
    is ordered rightly against: above them where it rates the better response, below where the other.

    An equal rating is not ordered rightly, so that a constant earns nothing, less than a guess. Where one of the two
    has no rating nothing is ordered; else as `agreements`. The mean over either prompt's samples is the share of right
    pairs of samples, so a group's mean is the accuracy of its ratings.
    """
    return _shares(
        prompts,
        ratings,
        left_out,
        lambda prompt, mine, other: mine > other if prompt.label == 1 else prompt.label == 2 and mine < other,
    )


def _shares(
    prompts: Sequence[Prompt],
    said: Sequence[SaidT | None],
    left_out: Sequence[bool],
    fits: Callable[[Prompt, SaidT, SaidT], bool],
) -> list[float | None]:
    """Of each response, the share of what the other prompt's responses of its group said that its own `fits`."""
    told: dict[tuple[str, bool], list[SaidT | None]] = defaultdict(list)
    for prompt, one, out in zip(prompts, said, left_out, strict=True):
        if not out:
            told[prompt.group_id, prompt.swapped].append(one)
    found: list[float | None] = []
    for prompt, mine in zip(prompts, said, strict=True):
        others = told.get((prompt.group_id, not prompt.swapped), [])
        fitting = [mine is not None and other is not None and fits(prompt, mine, other) for other in others]
        found.append(sum(fitting) / len(fitting) if fitting else None)
    return found


def as_stored(prompt: Prompt, answer: Label | None) -> Label | None:
    """The response that an answer names, as the row numbers it."""
    if answer is None or not prompt.swapped:
        return answer
    return 2 if answer == 1 else 1


def own_terms(format_reward: float, result_reward: float, consistency: float) -> dict[str, float]:
    """The terms of the rules, F, A and A C, by name. Consistency counts only when the result is right: being
    consistently wrong earns nothing."""
    return {"format": format_reward, "result": result_reward, "consistency": result_reward * consistency}


def reward_of(values: Mapping[str, float], section: RewardSection) -> float:
    """R, the weighted sum of the terms; by default 0.5 F + (1 A + 0.5 A C), paper sec. 4.3. Added from the last to the
    first, which is the grouping of the formula."""
    first, *others = [term.weight * values[term.name] for term in section.all_terms][::-1]
    for product in others:
        first = product + first
    return first


def term_values(scored: ScoredRollout, section: RewardSection) -> tuple[float, ...]:
    """The value of each of `section.all_terms`, before its weight."""
    own = own_terms(scored.format_reward, scored.result_reward, scored.consistency_reward)
    return tuple(own[term.name] if term.name in own else scored.terms[term.name] for term in section.all_terms)
