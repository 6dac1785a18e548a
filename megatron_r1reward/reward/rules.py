"""What a response is worth: strict parsing, and the rules that need no model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from megatron_r1reward.config.rl_sections import Truncated
from megatron_r1reward.data.prompt import RATINGS
from megatron_r1reward.types import JudgeVerdict, Label, Rollout

ConsistencyLevels = Literal["paper", "released_code"]

_WELL_FORMED = re.compile(r"<think>.*?</think><answer>.*?</answer>", re.DOTALL)
_THINK_TAG = re.compile(r"</?think>")
_CONTROL_TOKEN = re.compile(r"<\|[A-Za-z0-9_]+\|>")
_LABELS: Final[Mapping[str, Label]] = {"1": 1, "2": 2}
_RATINGS: Final[Mapping[str, int]] = {str(number): number for number in RATINGS}

# The paper calls consistency a bonus and gives no numbers; the released code also penalises an inconsistency.
_VALUES: Final[Mapping[ConsistencyLevels, Mapping[JudgeVerdict, float]]] = {
    "paper": {"consistent": 1.0},
    "released_code": {"consistent": 1.0, "inconsistent": -1.0},
}


@dataclass(frozen=True, kw_only=True)
class ParsedResponse:
    """What the rules and the judge need to know about one response."""

    answer: Label | None  # by the strict rule None unless the first <answer> holds exactly "1" or "2"
    well_formed: bool
    reasoning: str  # the text before <answer>, without think tags; all of it when there is no <answer>
    rating: int | None = None  # None unless the first <answer> holds exactly one of the whole numbers of `RATINGS`


def parse_response(text: str, read: Callable[[str], Label | None] | None = None) -> ParsedResponse:
    """Parse a decoded response: no free-text fallback, no numeric equivalence. `read` reads the answer in place of the
    strict rule (`reward.readers`).

    `well_formed` is the released code's rule: after stripping, the whole text is
    `<think>...</think><answer>...</answer>` with nothing in between (not even a space), and each opening tag occurs
    exactly once. It does not look at the answer's content, but control tokens are no part of a text. `answer` is read
    independently of the format.
    """
    whole, text = text, text.strip()
    before, _, after = text.partition("<answer>")
    content, closing_tag, _ = after.partition("</answer>")
    # Counting first also spares the pattern the texts on which it would backtrack.
    single_tags = text.count("<think>") == 1 and text.count("<answer>") == 1
    return ParsedResponse(
        answer=read(whole) if read is not None else _LABELS.get(content.strip()) if closing_tag else None,
        rating=_RATINGS.get(content.strip()) if closing_tag else None,
        well_formed=single_tags and _WELL_FORMED.fullmatch(text) is not None and not _CONTROL_TOKEN.search(text),
        reasoning=_THINK_TAG.sub("", before).strip(),
    )


def parse_rollout(
    rollout: Rollout, truncated: Truncated = "as_is", read: Callable[[str], Label | None] | None = None
) -> ParsedResponse:
    """Parse a sampled response. One that the token limit cut off, or with special tokens inside, is not well formed.

    Args:
        truncated: what a response that was cut off says: "as_is" is its text; else it has not answered.
    """
    parsed = parse_response(rollout.text, read)
    cut = rollout.finish_reason == "length"
    if cut and truncated != "as_is":
        return replace(parsed, answer=None, rating=None, well_formed=False)
    return replace(parsed, well_formed=parsed.well_formed and not (cut or rollout.special_tokens))


def as_rating(parsed: ParsedResponse) -> ParsedResponse:
    """What a response says to a pointwise prompt: no verdict, and without a rating it is not well formed."""
    return replace(parsed, answer=None, well_formed=parsed.well_formed and parsed.rating is not None)


def format_reward(parsed: ParsedResponse) -> float:
    """F: 1 when the response is well formed, else 0."""
    return float(parsed.well_formed)


def is_right(answer: Label | None, label: Label | None) -> bool:
    """An unparsable answer is a wrong one, and so is every answer where nobody knows the right one."""
    return label is not None and answer == label


def result_reward(parsed: ParsedResponse, label: Label | None) -> float:
    """A: 1 when the parsed answer is the label, else 0."""
    return float(is_right(parsed.answer, label))


def consistency_value(verdict: JudgeVerdict, levels: ConsistencyLevels) -> float:
    """C of a verdict: in {0, 1} ("paper") or {-1, 0, 1} ("released_code"); 0 when unknown or not asked."""
    return _VALUES[levels].get(verdict, 0.0)


def answer_probability(rollout: Rollout, token_text: Callable[[int], str]) -> float | None:
    """Probability that the sampler gave to the answer it drew, at the token that holds the digit of the first <answer>.

    The other digit has at most the rest. None: no token is the digit alone.
    """
    texts = [token_text(token) for token in rollout.token_ids]
    start = "".join(texts).find("<answer>")
    if start < 0:
        return None
    place, digit_from = 0, start + len("<answer>")
    for text, log_prob in zip(texts, rollout.log_probs, strict=True):
        place += len(text)
        if place > digit_from and text.strip() in ("1", "2"):
            return min(1.0, math.exp(log_prob))
    return None
