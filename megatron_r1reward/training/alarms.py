"""Signs that a run is going wrong, said in the log while something can still be done."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from megatron_r1reward.config.schema import AlgorithmSection

log = logging.getLogger(__name__)


def check(metrics: Mapping[str, float], algorithm: AlgorithmSection, step: int) -> None:
    """Warn when sampler and trainer drift apart, when updates are skipped, or when a reward has lost its signal."""
    gap, beyond = metrics["mismatch/mean_abs"], metrics["mismatch/share_beyond"]
    # also when they are NaN
    if not (gap <= algorithm.mismatch_alarm and beyond <= algorithm.mismatch_share_alarm):
        log.warning(
            "step %d: rollout servers and trainer disagree by %.4f nats per token on average (alarm at %.4f), by more "
            "than %g nats on %.2f %% of the tokens (alarm at %.2f %%), KL %.4g: %s",
            step,
            gap,
            algorithm.mismatch_alarm,
            algorithm.mismatch_threshold,
            100 * beyond,
            100 * algorithm.mismatch_share_alarm,
            metrics["mismatch/kl"],
            _remedy(metrics["staleness/max"]),
        )
    if metrics["update/skipped"]:
        log.warning("step %d: %d updates skipped, their gradient was not finite", step, metrics["update/skipped"])
    if metrics["judge/asked"] and metrics["judge/unknown"] == metrics["judge/asked"]:
        log.warning("step %d: no judge call gave a verdict; C is 0 for all: see the judge's log", step)
    if metrics["rollout/failed"]:
        log.warning("step %d: %d prompts got no rollout", step, metrics["rollout/failed"])


def _remedy(staleness: float) -> str:
    if staleness > 0:
        return (
            f"the weights that sampled are up to {staleness:g} steps old: lower optimizer.lr, "
            "asynchrony.batches_ahead or asynchrony.max_staleness, or sample synchronously; if that does not help, "
            "compare precision and image limits of both"
        )
    return "check that both use the same precision, image limits and weights"
