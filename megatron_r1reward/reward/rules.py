"""What a response is worth: strict parsing, the rules that need no model, and one number from the parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

from megatron_r1reward.config.rl_sections import Truncated
from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.types import JudgeVerdict, Label, Rollout

ConsistencyLevels = Literal["paper", "released_code"]

_WELL_FORMED = re.compile(r"<think>.*?</think><answer>.*?</answer>", re.DOTALL)
_THINK_TAG = re.compile(r"</?think>")
_CONTROL_TOKEN = re.compile(r"<\|[A-Za-z0-9_]+\|>")
_LABELS: Final[Mapping[str, Label]] = {"1": 1, "2": 2}

# The paper calls consistency a bonus and gives no numbers; the released code also penalises an inconsistency.
_VALUES: Final[Mapping[ConsistencyLevels, Mapping[JudgeVerdict, float]]] = {
    "paper": {"consistent": 1.0},
    "released_code": {"consistent": 1.0, "inconsistent": -1.0},
}


@dataclass(frozen=True, kw_only=True)
class ParsedResponse:
    """What the rules and the judge need to know about one response."""

    answer: Label | None  # None unless the first <answer> holds exactly "1" or "2"
    well_formed: bool
    reasoning: str  # the text before <answer>, without think tags; all of it when there is no <answer>


def parse_response(text: str) -> ParsedResponse:
    """Parse a decoded response: no free-text fallback, no numeric equivalence.

    `well_formed` is the released code's rule: after stripping, the whole text is
    `<think>...</think><answer>...</answer>` with nothing in between (not even a space), and each opening tag occurs
    exactly once. It does not look at the answer's content, but control tokens are no part of a text. `answer` is read
    independently of the format.
    """
    text = text.strip()
    before, _, after = text.partition("<answer>")
    content, closing_tag, _ = after.partition("</answer>")
    # Counting first also spares the pattern the texts on which it would backtrack.
    single_tags = text.count("<think>") == 1 and text.count("<answer>") == 1
    return ParsedResponse(
        answer=_LABELS.get(content.strip()) if closing_tag else None,
        well_formed=single_tags and _WELL_FORMED.fullmatch(text) is not None and not _CONTROL_TOKEN.search(text),
        reasoning=_THINK_TAG.sub("", before).strip(),
    )


def parse_rollout(rollout: Rollout, truncated: Truncated = "as_is") -> ParsedResponse:
    """Parse a sampled response. One that the token limit cut off, or with special tokens inside, is not well formed.

    Args:
        truncated: what a response that was cut off says: "as_is" is its text; else it has not answered.
    """
    parsed = parse_response(rollout.text)
    cut = rollout.finish_reason == "length"
    if cut and truncated != "as_is":
        return replace(parsed, answer=None, well_formed=False)
    return replace(parsed, well_formed=parsed.well_formed and not (cut or rollout.special_tokens))


def format_reward(parsed: ParsedResponse) -> float:
    """F: 1 when the response is well formed, else 0."""
    return float(parsed.well_formed)


def result_reward(parsed: ParsedResponse, label: Label) -> float:
    """A: 1 when the parsed answer is the label, else 0; an unparsable answer is a wrong one."""
    return float(parsed.answer == label)


def consistency_value(verdict: JudgeVerdict, levels: ConsistencyLevels) -> float:
    """C of a verdict: in {0, 1} ("paper") or {-1, 0, 1} ("released_code"); 0 when unknown or not asked."""
    return _VALUES[levels].get(verdict, 0.0)


def reward_terms(format_reward: float, result_reward: float, consistency: float) -> tuple[float, float, float]:
    """F, A and A C. Consistency counts only when the result is right: being consistently wrong earns nothing."""
    return format_reward, result_reward, result_reward * consistency


def term_weights(section: RewardSection) -> tuple[float, float, float]:
    """What `reward_terms` count in the reward."""
    return section.format_weight, 1.0, section.consistency_weight


def combine(format_reward: float, result_reward: float, consistency: float, section: RewardSection) -> float:
    """R = format_weight * F + A * (1 + consistency_weight * C); paper sec. 4.3 with both weights 0.5."""
    of_format, of_result, of_consistency = (
        weight * term
        for weight, term in zip(
            term_weights(section), reward_terms(format_reward, result_reward, consistency), strict=True
        )
    )
    return of_format + (of_result + of_consistency)


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
