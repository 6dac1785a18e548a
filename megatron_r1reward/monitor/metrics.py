"""The one table of metric names. A name that is not listed here cannot be logged."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric: its unit, what it says, and which direction is good news."""

    name: str
    unit: str
    description: str
    better: Better


def _metric(name: str, unit: str, better: Better, description: str) -> Metric:
    return Metric(name=name, unit=unit, description=description, better=better)


_TABLE = (
    # Optimizer step
    _metric("loss", "nats", "neither", "policy loss of the step, after aggregation over the global batch"),
    _metric("grad_norm", "1", "lower", "global gradient norm before clipping"),
    _metric("lr", "1", "neither", "learning rate of the step"),
    _metric("update/skipped", "steps", "lower", "optimizer steps skipped because the gradient norm was not finite"),
    _metric("update/idle_sequences", "responses", "neither", "responses without any advantage, left out of the update"),
    _metric("update/imbalance", "1", "lower", "expected work of the busiest data-parallel rank over the mean"),
    _metric("entropy", "nats", "neither", "mean entropy of the policy over response tokens"),
    _metric("tokens_per_second", "1/s", "higher", "prompt and response tokens trained on, per second of step time"),
    # Reward R = 0.5 F + A (1 + 0.5 C)
    _metric("reward/mean", "1", "higher", "mean reward R of the rollouts"),
    _metric("reward/format", "1", "higher", "mean format reward F: share of well-formed responses"),
    _metric("reward/result", "1", "higher", "mean result reward A: share of right answers, where there is a label"),
    _metric("reward/consistency", "1", "higher", "mean consistency reward C over the rollouts"),
    # Responses
    _metric("response/mean_tokens", "tokens", "neither", "mean response length"),
    _metric("response/max_tokens", "tokens", "neither", "longest response"),
    _metric("response/truncated_fraction", "1", "lower", "share of responses cut off by the token limit"),
    _metric("response/masked_fraction", "1", "lower", "share of responses that train nothing, cut off as they are"),
    _metric("response/special_tokens_fraction", "1", "lower", "share of responses with special tokens inside"),
    _metric("rollout/failed", "prompts", "lower", "prompts that no rollout server could answer"),
    _metric("rollout/quarantined", "rollouts", "lower", "rollouts refused because they hold a banned token id"),
    _metric("rollout/retried", "prompts", "lower", "prompts asked again because a server failed"),
    _metric("rollout/withdrawn", "requests", "lower", "requests taken back from a server that had stopped answering"),
    _metric("rollout/unfinished", "requests", "lower", "answers thrown away: a response was aborted or empty"),
    _metric("rollout/stale", "requests", "lower", "answers thrown away: sampled under weights that were not current"),
    _metric("servers/ready", "servers", "higher", "rollout servers in service at the end of the generation"),
    _metric("servers/free_asleep_gb", "GB", "higher", "free device memory when colocated servers had fallen asleep"),
    _metric("servers/free_before_wake_gb", "GB", "higher", "free device memory before colocated servers last woke"),
    _metric("servers/restarts", "restarts", "lower", "restarts of rollout servers since the run was started"),
    _metric("rollout/answer_1_fraction", "1", "neither", "share of parsed answers that are 1: far from 0.5 is a bias"),
    _metric("rating/mean", "1", "neither", "mean rating of a pointwise model's responses"),
    _metric("rating/std", "1", "neither", "standard deviation of these ratings: at 0 nothing is told apart"),
    _metric("rating/commonest_fraction", "1", "lower", "share of these ratings that are the commonest one"),
    _metric("rollout/unparsable_fraction", "1", "lower", "share of responses whose answer is neither 1 nor 2"),
    _metric("rollout/unlabelled_fraction", "1", "neither", "share of responses to pairs without a label"),
    _metric("judge/asked", "calls", "neither", "rollouts shown to the consistency judge (right answers only)"),
    _metric("judge/consistent", "calls", "higher", "verdicts: the reasoning supports the answer"),
    _metric("judge/inconsistent", "calls", "lower", "verdicts: the reasoning contradicts the answer"),
    _metric("judge/unknown", "calls", "lower", "judge calls without a usable verdict after all retries"),
    _metric("judge/cached", "questions", "neither", "questions whose verdict was known from an earlier call"),
    _metric("judge/over_budget", "questions", "lower", "questions not asked because of judge.max_calls_per_step"),
    _metric("judge/not_tried", "questions", "lower", "questions not asked because the judge had stopped answering"),
    _metric("judge/steps_without", "steps", "lower", "steps in a row in which the judge gave no verdict at all"),
    # Asynchrony and dynamic sampling
    _metric("staleness/mean", "steps", "lower", "mean age of the weights that sampled a token, when it is trained on"),
    _metric("staleness/max", "steps", "lower", "age of the oldest weights that sampled a token of the step"),
    _metric(
        "staleness/switched_fraction", "1", "neither", "share of rollouts that began and ended under other weights"
    ),
    _metric("staleness/regenerated", "rollouts", "lower", "rollouts sampled again because they were too old"),
    _metric("sampling/extra_rounds", "rounds", "lower", "further rounds of generation by dynamic sampling"),
    _metric(
        "sampling/resampled", "prompts", "neither", "prompts that others took the place of: all right or all wrong"
    ),
    _metric("sampling/uninformative", "prompts", "lower", "prompts left with samples that are all right or all wrong"),
    # Advantages
    _metric("advantage/mean", "1", "neither", "mean of the returns before normalisation, over action tokens"),
    _metric("advantage/std", "1", "neither", "standard deviation of the returns before normalisation"),
    _metric("advantage/filtered_fraction", "1", "neither", "share of action tokens the advantage filter zeroed"),
    _metric("advantage/filtered_positive", "1", "neither", "share of action tokens zeroed with a positive advantage"),
    _metric("advantage/positive_kept", "1", "neither", "share of action tokens that train with a positive advantage"),
    _metric("advantage/negative_kept", "1", "neither", "share of action tokens that train with a negative advantage"),
    _metric("advantage/balance", "1", "neither", "(positive - negative) / all of the summed |advantage|; 0: balanced"),
    _metric("advantage/filtered_negative", "1", "neither", "share of action tokens zeroed with a negative advantage"),
    _metric("health/rollbacks", "rollbacks", "lower", "rollbacks of the run so far (health.policy = 'rollback')"),
    # Critic
    _metric("critic/loss", "1", "lower", "value loss of the step, after aggregation over the global batch"),
    _metric(
        "critic/explained_variance", "1", "higher", "1 - Var(G - V) / Var(G) over response tokens, before the update"
    ),
    _metric("critic/value_mean", "1", "neither", "mean value of the response tokens, before the update"),
    _metric("critic/clipped_fraction", "1", "lower", "share of tokens where the value clip is active"),
    _metric("critic/grad_norm", "1", "lower", "global norm of the critic's gradient before clipping"),
    _metric("critic/lr", "1", "neither", "learning rate of the critic"),
    _metric("critic/skipped", "steps", "lower", "the critic's optimizer steps skipped: the norm was not finite"),
    # Policy ratio and sampler mismatch
    _metric("ratio/mean", "1", "neither", "mean probability ratio new / old over action tokens"),
    _metric("ratio/max_abs_log", "nats", "lower", "largest |log ratio| new / old"),
    _metric("ratio/preclipped_fraction", "1", "lower", "share of tokens whose log ratio Pre-CLIP clamped"),
    _metric("ratio/clipped_fraction", "1", "neither", "share of tokens where the PPO clip is active"),
    _metric("mismatch/mean_abs", "nats", "lower", "mean |log-prob difference| between rollout server and trainer"),
    _metric("mismatch/max_abs", "nats", "lower", "largest |log-prob difference| between rollout server and trainer"),
    _metric("mismatch/kl", "nats", "lower", "k3 estimate of KL(rollout server || trainer)"),
    _metric("mismatch/share_beyond", "1", "lower", "share of tokens with a gap above algorithm.mismatch_threshold"),
    _metric("correction/weight", "1", "neither", "mean truncated importance weight trainer / rollout server"),
    _metric("correction/truncated", "1", "lower", "share of tokens whose importance weight was cut to its cap"),
    # Wall time of the phases of one step
    _metric("time/wait", "s", "lower", "the trainer waiting for rollouts: 0 when it never does"),
    _metric("time/generate", "s", "lower", "sampling the rollouts"),
    _metric("time/score", "s", "lower", "scores that were still missing when the last sample had come"),
    _metric("time/log_probs", "s", "lower", "old (and reference) log-probabilities, and values"),
    _metric("time/update", "s", "lower", "forward, backward and optimizer"),
    _metric("time/push", "s", "lower", "weight push to the rollout servers"),
    _metric("time/save", "s", "lower", "checkpointing, as far as it blocks the step"),
    _metric("time/heldout", "s", "lower", "the probe of held-out accuracy"),
    _metric("time/step", "s", "lower", "the whole step"),
    # Share of the step that a device had nothing to do, as the main rank sees it
    _metric("idle/generation", "1", "lower", "mean over rollout servers: no request in flight"),
    _metric("idle/judge", "1", "lower", "mean over judge servers: no call in flight"),
    _metric("idle/trainer", "1", "lower", "the trainer waiting for rollouts, or for the moment to push"),
    # Quality
    _metric("heldout/accuracy", "1", "higher", "accuracy on held-out pairs, mean of both answer orders"),
    _metric("rm/loss", "nats", "lower", "mean Bradley-Terry loss over pairs, of the scalar reward model"),
    _metric("rm/accuracy", "1", "higher", "share of the batch's pairs whose better response has the higher reward"),
    _metric("rm/margin", "1", "neither", "reward of the better response minus that of the other, mean over pairs"),
    _metric("rm/reward_mean", "1", "neither", "mean reward of the batch's responses; the loss does not fix it"),
    _metric("rm/reward_std", "1", "neither", "standard deviation of the batch's rewards"),
    _metric("sft/loss", "nats", "lower", "mean cross-entropy over response tokens"),
)

# `reward.terms` may have any names: each term's mean before its weight, and with "_std" its standard deviation.
_TERM = re.compile(r"terms/[a-z][a-z0-9_]*")
METRICS: Mapping[str, Metric] = MappingProxyType({metric.name: metric for metric in _TABLE})


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same metrics as plain floats.

    Raises:
        ValueError: a name is neither in `METRICS` nor of a term of the reward, or a value is not a number.
    """
    checked = {}
    for name, value in metrics.items():
        if name not in METRICS and _TERM.fullmatch(name) is None:
            close = difflib.get_close_matches(name, METRICS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "add it to the table in monitor/metrics.py"
            raise ValueError(f"metric {name!r} is not in the table of metrics: {hint}")
        try:
            checked[name] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metric {name!r} has the value {value!r}: log one number") from error
    return checked
