"""Signs that a run is going wrong, said in the log while something can still be done.

`check` looks at one step: sampler and trainer drift apart, updates are skipped. `Health` follows the learning signal
over steps: a run whose rewards, advantages or samples hold nothing to learn from goes on as if nothing were wrong, and
so does one whose policy is right less and less often.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_r1reward.config.schema import AlgorithmSection, HealthSection, RunConfig
from megatron_r1reward.monitor.sinks import read_rows

log = logging.getLogger(__name__)


class SignalGoneError(ValueError):
    """There has been nothing to learn from for `health.patience` steps, and `health.policy` does not go on."""


class Health:
    """Whether there is something to learn from. The same metrics on every rank give the same answer on every rank.

    Attributes:
        began: the first step of the cause that `check` gave as a reason.

    Args:
        rollouts: of a step, which say how much its share of right samples is worth; 0: that share is not followed.
        best: the largest share of right samples before the first step that will be checked (`best_so_far`).
        speaks: whether this rank writes warnings: when a cause begins, and at every `patience`-th step that it lasts.
    """

    def __init__(
        self,
        section: HealthSection,
        algorithm: AlgorithmSection,
        *,
        rollouts: int = 0,
        best: float = 0.0,
        speaks: bool = True,
    ) -> None:
        self._section, self._algorithm, self._speaks = section, algorithm, speaks
        self._lasting: Counter[str] = Counter()  # cause -> steps in a row
        self._best, self._rollouts = best, rollouts
        self.began = 0

    def check(self, metrics: Mapping[str, float], step: int) -> str | None:
        """Why the run should stop after step `step`; None: it may go on."""
        found = self.look(metrics)
        self._lasting = Counter({cause: self._lasting[cause] + 1 for cause in found})
        patience = self._section.patience
        for cause, text in found.items():
            lasted = self._lasting[cause]
            if self._speaks and (lasted == 1 or lasted % patience == 0):
                log.warning("step %d: %s (%d steps in a row)", step, text, lasted)
        gone = [cause for cause, lasted in self._lasting.items() if lasted >= patience]
        if self._section.policy == "warn" or not gone:
            return None
        self.began = step - max(self._lasting[cause] for cause in gone) + 1
        what = "the policy has got worse" if gone[0] == "fallen" else "there has been nothing to learn from"
        reason = f"{what} for {self._lasting[gone[0]]} steps: {found[gone[0]]}"
        if self._section.policy == "rollback":
            return reason
        return f"{reason}; start again with other settings, or set health.policy='warn' to go on"

    def look(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """What is wrong with the next step: cause to what is seen and what to change. Once for each step, in order."""
        return dict(causes(metrics, self._section, self._algorithm)) | self._fallen(metrics["reward/result"])

    def _fallen(self, right: float) -> dict[str, str]:
        """Whether fewer samples are right than in the best step, by more than `max_fall` and by more than four standard
        errors of the difference between two steps: the best of 200 steps is a lucky one, but less than one in a
        thousand such runs has five steps in a row that are so far below it by chance."""
        if not self._rollouts:
            return {}
        best, self._best = self._best, max(self._best, right)
        pooled = (best + right) / 2
        error = math.sqrt(2 * pooled * (1 - pooled) / self._rollouts)
        if best - right <= max(self._section.max_fall, 4 * error):
            return {}
        text = (
            f"{_percent(right)} of the samples are right, {_percent(best)} were (health.max_fall "
            f"{self._section.max_fall:g}): lower optimizer.lr or rl.epochs_per_batch, use fresher samples, go back to "
            "an earlier checkpoint"
        )
        return {"fallen": text}


def best_so_far(metrics: Path, step: int) -> float:
    """The share of right samples in the best step up to `step`, which a run goes on from, by its file of metrics.

    Raises:
        ValueError: a line of the file is not a row.
    """
    rows = read_rows(metrics) if metrics.exists() else []
    return max((row.get("reward/result", 0.0) for row in rows if row["step"] <= step), default=0.0)


def steps_ahead(config: RunConfig) -> int:
    """Steps between the weights that sample a batch and the step that trains on it, at most."""
    return 0 if config.asynchrony.mode == "synchronous" else config.asynchrony.batches_ahead


def steps_kept(config: RunConfig) -> int:
    """Checkpoints of so many steps ago have to be there still: an alarm of now may go back to them. 0: none have to."""
    return config.health.patience + 1 + steps_ahead(config) if config.health.policy == "rollback" else 0


def causes(
    metrics: Mapping[str, float], section: HealthSection, algorithm: AlgorithmSection
) -> Iterator[tuple[str, str]]:
    """Why one step teaches nothing: (cause, what is seen and what to change)."""
    yield from _samples(metrics, section)
    right, spread = f"at {_percent(metrics['reward/result'])} right", metrics["advantage/std"]
    negative, positive = metrics["advantage/filtered_negative"], metrics["advantage/filtered_positive"]
    if not spread > section.min_reward_std:
        text = (
            f"rewards differ by {spread:.2g} {right} (health.min_reward_std {section.min_reward_std:g}): there is "
            "nothing to compare; use rows that are neither too easy nor too hard (data.select), more "
            "algorithm.samples_per_prompt, rl.dynamic_sampling_rounds"
        )
        yield "spread", text
    elif negative > 0 and not metrics["advantage/negative_kept"]:
        text = (
            f"the advantage filter removed all negative evidence ({_percent(negative)} of the tokens) {right}: what is "
            "wrong is no longer learned from; use harder rows (data.select), algorithm.filter='clamp', a larger "
            f"algorithm.filter_sigma (now {algorithm.filter_sigma:g}) or algorithm.filter='none'"
        )
        yield "one_sided", text
    elif positive > 0 and not metrics["advantage/positive_kept"]:
        text = (
            f"the advantage filter removed all positive evidence ({_percent(positive)} of the tokens) {right}: what is "
            "right is never learned; use easier rows (data.select), algorithm.filter='clamp' or 'none'"
        )
        yield "one_sided", text
    elif (share := 0.5 + 0.5 * abs(metrics["advantage/balance"])) > section.one_sided_share:
        side = "positive" if metrics["advantage/balance"] > 0 else "negative"
        text = (
            f"{_percent(share)} of the evidence is {side} {right} "
            f"(health.one_sided_share {section.one_sided_share:g}): the policy is told one thing only; with a filter "
            f"use algorithm.filter='clamp', a larger algorithm.filter_sigma (now {algorithm.filter_sigma:g}) or "
            "algorithm.filter='none', without one algorithm.normalize='global' or a baseline"
        )
        yield "one_sided", text
    elif metrics.get("grad_norm") == 0.0:  # not measured while the critic alone is trained
        text = (
            f"the gradient is exactly 0 {right}: filter, baseline and clip leave no token an advantage; look at "
            "advantage/* and ratio/*, change algorithm.filter or the clips"
        )
        yield "gradient", text


def _samples(metrics: Mapping[str, float], section: HealthSection) -> Iterator[tuple[str, str]]:
    """What is wrong with the responses themselves."""
    unparsable, cut = metrics["rollout/unparsable_fraction"], metrics["response/truncated_fraction"]
    ones, same = metrics.get("rollout/answer_1_fraction"), metrics.get("rating/commonest_fraction", 0.0)
    entropy = metrics.get("entropy")  # not measured where old log-probs are the sampler's
    if unparsable >= section.share:
        text = (
            f"{_percent(unparsable)} of the responses hold no answer: train the format in SFT first, raise "
            "sampling.max_tokens if they are cut off, lower optimizer.lr if they were fine before"
        )
        yield "unparsable", text
    elif same >= section.share:
        text = (
            f"{_percent(same)} of the ratings are the same number, which orders no pair: more "
            "algorithm.samples_per_prompt or sampling.temperature, a lower optimizer.lr, or an earlier checkpoint"
        )
        yield "same_answer", text
    elif ones is not None and not 1.0 - section.share < ones < section.share:
        text = (
            f"{_percent(ones)} of the answers are 1, nearly all are the same: keep data.swap='random', balance the "
            "labels, lower optimizer.lr or go back to an earlier checkpoint"
        )
        yield "same_answer", text
    if cut >= section.share:
        text = "of the responses are cut off: raise sampling.max_tokens, or train shorter reasonings in SFT"
        yield "truncated", f"{_percent(cut)} {text}"
    if entropy is not None and not entropy > section.min_entropy:
        text = (
            f"the policy's entropy is {entropy:.2g} nats (health.min_entropy {section.min_entropy:g}), samples no "
            "longer differ: raise algorithm.entropy_coefficient or sampling.temperature, lower optimizer.lr"
        )
        yield "entropy", text


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


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
    if metrics.get("update/skipped"):
        log.warning("step %d: %d updates skipped, their gradient was not finite", step, metrics["update/skipped"])
    if metrics.get("critic/skipped"):
        log.warning(
            "step %d: %d updates of the critic skipped, their gradient was not finite", step, metrics["critic/skipped"]
        )
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
