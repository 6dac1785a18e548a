"""The two rewards that need no model."""

from __future__ import annotations

from megatron_r1reward.reward.parse import ParsedResponse
from megatron_r1reward.types import Label


def format_reward(parsed: ParsedResponse) -> float:
    """F: 1 when the response is well formed, else 0."""
    return float(parsed.well_formed)


def result_reward(parsed: ParsedResponse, label: Label) -> float:
    """A: 1 when the parsed answer is the label, else 0; an unparsable answer is a wrong one."""
    return float(parsed.answer == label)
