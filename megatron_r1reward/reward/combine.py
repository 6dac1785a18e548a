"""One number from the parts of a reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.types import JudgeVerdict

ConsistencyLevels = Literal["paper", "released_code"]

# The paper calls consistency a bonus and gives no numbers; the released code also penalises an inconsistency.
_VALUES: Final[Mapping[ConsistencyLevels, Mapping[JudgeVerdict, float]]] = {
    "paper": {"consistent": 1.0},
    "released_code": {"consistent": 1.0, "inconsistent": -1.0},
}


def consistency_value(verdict: JudgeVerdict, levels: ConsistencyLevels) -> float:
    """C of a verdict: in {0, 1} ("paper") or {-1, 0, 1} ("released_code"); 0 when unknown or not asked."""
    return _VALUES[levels].get(verdict, 0.0)


def combine(format_reward: float, result_reward: float, consistency: float, section: RewardSection) -> float:
    """R = format_weight * F + A * (1 + consistency_weight * C); paper sec. 4.3 with both weights 0.5.

    Consistency counts only when the result is right: being consistently wrong earns nothing.
    """
    return section.format_weight * format_reward + result_reward * (1.0 + section.consistency_weight * consistency)
