"""Signs that a run is going wrong, said in the log while something can still be done."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from megatron_r1reward.config.schema import AlgorithmSection

log = logging.getLogger(__name__)


def check(metrics: Mapping[str, float], algorithm: AlgorithmSection, step: int) -> None:
    """Warn when sampler and trainer drift apart, when updates are skipped, or when a reward has lost its signal."""
    gap = metrics["mismatch/mean_abs"]
    if not gap <= algorithm.mismatch_alarm:  # also when it is NaN
        log.warning(
            "step %d: rollout servers and trainer disagree by %.4f nats per token on average (alarm at %.4f): "
            "check that both use the same precision, image limits and weights",
            step,
            gap,
            algorithm.mismatch_alarm,
        )
    if metrics["update/skipped"]:
        log.warning("step %d: %d updates skipped, their gradient was not finite", step, metrics["update/skipped"])
    if metrics["judge/asked"] and metrics["judge/unknown"] == metrics["judge/asked"]:
        log.warning("step %d: no judge call gave a verdict; C is 0 for all: see the judge's log", step)
    if metrics["rollout/failed"]:
        log.warning("step %d: %d prompts got no rollout", step, metrics["rollout/failed"])
