"""Reward terms: functions of all responses of a step that return one number for each.

[reward]
terms = [
  { name = "format", weight = 0.5 },
  { name = "result" },
  { name = "consistency", weight = 0.5 },
  { name = "brevity", weight = 0.1, function = "recipes/parts/reward_terms.py:brevity" },
]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_r1reward.reward.terms import TermInput

LONG = 600  # tokens of a response that earns nothing


def brevity(rows: list[TermInput]) -> list[float]:
    """From 1 for no tokens down to 0 for `LONG` of them, for right answers only: what is wrong should not be short."""
    return [
        max(0.0, 1.0 - row.tokens / LONG) if row.label is not None and row.answer == row.label else 0.0 for row in rows
    ]


def reads_both(rows: list[TermInput]) -> list[float]:
    """1 where the reasoning speaks of both responses."""
    return [float("Response 1" in row.reasoning and "Response 2" in row.reasoning) for row in rows]
