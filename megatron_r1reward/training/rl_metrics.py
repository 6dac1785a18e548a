"""What one RL step reports about its rollouts, advantages and the gap between sampler and trainer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from megatron_r1reward.algorithm.policy_loss import mismatch_metrics, truncated_importance_weights
from megatron_r1reward.config.schema import RewardSection
from megatron_r1reward.data.prompt import RATINGS
from megatron_r1reward.reward.terms import term_values
from megatron_r1reward.rollout.accounting import Accounting
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.training.rollout_batch import RolloutBatch
from megatron_r1reward.training.schedule import reduce_statistics
from megatron_r1reward.training.state import TrainState
from megatron_r1reward.training.step_sampler import StepRollouts
from megatron_r1reward.types import ScoredRollout


def rollout_metrics(
    scored: Sequence[ScoredRollout], counts: Mapping[str, int], section: RewardSection
) -> dict[str, float]:
    """Means over the rollouts of one step, `reward/result` over those that have a label; `counts` are those of
    `RewardScorer.score`.

    Raises:
        ValueError: there is no rollout.
    """
    if not scored:
        raise ValueError("no prompt of this step got a rollout: see the rollout servers' logs")
    total = len(scored)
    lengths = [len(item.rollout.token_ids) for item in scored]
    unlabelled = counts.get("unlabelled", 0)  # records of earlier versions do not count them
    return {
        "reward/mean": sum(item.reward for item in scored) / total,
        "reward/format": sum(item.format_reward for item in scored) / total,
        "reward/result": sum(item.result_reward for item in scored) / max(total - unlabelled, 1),
        "reward/consistency": sum(item.consistency_reward for item in scored) / total,
        "response/mean_tokens": sum(lengths) / total,
        "response/max_tokens": max(lengths),
        "response/truncated_fraction": counts["truncated"] / total,
        "response/masked_fraction": counts["masked"] / total,
        "response/special_tokens_fraction": counts["special_tokens"] / total,
        **_answers(scored, counts),
        "rollout/unparsable_fraction": counts["unparsable"] / total,
        "rollout/unlabelled_fraction": unlabelled / total,
        "judge/asked": counts["judge_asked"],
        "judge/consistent": counts["judge_consistent"],
        "judge/inconsistent": counts["judge_inconsistent"],
        "judge/unknown": counts["judge_unknown"],
        "judge/cached": counts["judge_cached"],
        "judge/over_budget": counts["judge_over_budget"],
        "judge/not_tried": counts["judge_not_tried"],
        "judge/steps_without": counts["judge_steps_without"],
    } | term_metrics(scored, section)


def _answers(scored: Sequence[ScoredRollout], counts: Mapping[str, int]) -> dict[str, float]:
    """What is said: how often the first place wins, or of a pointwise model its ratings."""
    ratings = [item.rating for item in scored if item.rating is not None]
    if not ratings:
        return {"rollout/answer_1_fraction": counts["answer_1"] / max(len(scored) - counts["unparsable"], 1)}
    return {
        "rating/mean": statistics.fmean(ratings),
        "rating/std": statistics.pstdev(ratings),
        "rating/commonest_fraction": max(map(ratings.count, RATINGS)) / len(ratings),
    }


def term_metrics(scored: Sequence[ScoredRollout], section: RewardSection) -> dict[str, float]:
    """Mean and standard deviation of each term of the reward, before its weight, over the rollouts that train. A term
    that does not vary teaches nothing."""
    trained = [item for item in scored if not item.masked] or scored
    columns = zip(*(term_values(item, section) for item in trained), strict=True)
    found = {}
    for term, values in zip(section.all_terms, columns, strict=True):
        found[f"terms/{term.name}"] = statistics.fmean(values)
        found[f"terms/{term.name}_std"] = statistics.pstdev(values)
    return found


def age_metrics(scored: Sequence[ScoredRollout], version: int) -> dict[str, float]:
    """How many steps older than `version`, the weights that are about to be updated, those were that sampled."""
    ages, tokens = [], 0
    for item in scored:
        for span in item.rollout.weight_spans:
            ages.append((version - span.version) * (span.end - span.start))
            tokens += span.end - span.start
    return {
        "staleness/mean": sum(ages) / max(tokens, 1),
        "staleness/max": max((version - span.version for i in scored for span in i.rollout.weight_spans), default=0),
        "staleness/switched_fraction": sum(len(item.rollout.weight_spans) > 1 for item in scored) / len(scored),
    }


def step_metrics(batch: StepRollouts, pool: RolloutPool | None, section: RewardSection) -> dict[str, float]:
    """Everything that is known of a step's rollouts before they are trained on. A replay has no pool."""
    generated = batch.generated
    metrics = rollout_metrics(batch.scored, batch.counts, section) | age_metrics(batch.scored, generated.step)
    metrics |= account_metrics(generated.accounting) | ({} if pool is None else server_metrics(pool))
    return metrics | {
        "staleness/regenerated": batch.regenerated,
        "sampling/extra_rounds": generated.rounds,
        "sampling/resampled": generated.resampled,
        "sampling/uninformative": generated.uninformative,
        "time/generate": generated.seconds,
        "time/score": batch.seconds,
    }


def account_metrics(account: Accounting) -> dict[str, float]:
    """What became of the prompts of one step."""
    return {
        "rollout/failed": account.failed,
        "rollout/quarantined": account.quarantined,
        "rollout/retried": account.retried,
        "rollout/withdrawn": account.withdrawn,
        "rollout/unfinished": account.unfinished,
        "rollout/stale": account.stale,
    }


def server_metrics(pool: RolloutPool) -> dict[str, float]:
    """The state of the rollout servers."""
    servers = pool.status()
    return pool.sleep_metrics() | {
        "servers/ready": sum(server.state == "ready" for server in servers),
        "servers/restarts": sum(server.restarts for server in servers),
    }


def mismatch(state: TrainState, batch: RolloutBatch) -> dict[str, float]:
    """The gap between the rollout servers' log-probs and the trainer's, over all ranks. Nothing where the trainer's are
    known in the update only: the ratio is the gap then."""
    if state.config.algorithm.old_log_probs == "sampler":
        return {}
    local: dict[str, float] = {}
    if state.topology.is_last_stage:
        assert batch.old_log_probs is not None and batch.entropy is not None
        tokens = batch.old_log_probs.numel()
        algorithm = state.config.algorithm
        gap = mismatch_metrics(batch.old_log_probs, batch.sampler_log_probs, threshold=algorithm.mismatch_threshold)
        local = {
            "tokens": tokens,
            "abs": gap["mean_abs"] * tokens,
            "kl": gap["kl"] * tokens,
            "max_abs": gap["max_abs"],
            "beyond": gap["share_beyond"] * tokens,
            "entropy": float(batch.entropy.sum()),
        }
        if (cap := algorithm.truncated_importance_sampling) is not None:
            weights_R = truncated_importance_weights(batch.old_log_probs, batch.sampler_log_probs, cap)
            local |= {"weight": float(weights_R.sum()), "truncated": float((weights_R >= cap).sum())}
    total = reduce_statistics(state, [local])
    return {
        "mismatch/mean_abs": total["abs"] / total["tokens"],
        "mismatch/max_abs": total["max_abs"],
        "mismatch/kl": total["kl"] / total["tokens"],
        "mismatch/share_beyond": total["beyond"] / total["tokens"],
        "entropy": total["entropy"] / total["tokens"],
    } | {f"correction/{name}": total[name] / total["tokens"] for name in ("weight", "truncated") if name in total}


def advantage_metrics(state: TrainState, batch: RolloutBatch) -> dict[str, float]:
    """Statistics of the raw returns (with a critic: of its advantages) and the share of tokens the filter zeroed, by
    the sign of what it removed."""
    local: dict[str, float] = {}
    if state.topology.is_last_stage and state.topology.tensor_parallel_rank == 0:
        assert batch.filtered is not None and batch.advantages is not None
        lengths = batch.cu_response.diff()
        earned_R = batch.rewards.repeat_interleave(lengths)
        if batch.values is not None and batch.value_targets is not None:
            earned_R = batch.value_targets - batch.values
        positive = earned_R > batch.returns_mean
        judged = batch.filtered & batch.rewards.isfinite().repeat_interleave(lengths)  # masked ones are not
        local = {
            "tokens": batch.filtered.numel(),
            "filtered": int(judged.sum()),
            "filtered_positive": int((judged & positive).sum()),
            "positive": int((batch.advantages > 0).sum()),
            "negative": int((batch.advantages < 0).sum()),
            "evidence_for": float(batch.advantages.clamp(min=0).sum()),
            "evidence_against": float(-batch.advantages.clamp(max=0).sum()),
            "max_mean": batch.returns_mean,
            "max_std": batch.returns_std,
        }
    total = reduce_statistics(state, [local])
    filtered, positive_share = (total[name] / total["tokens"] for name in ("filtered", "filtered_positive"))
    return {
        "advantage/mean": total["max_mean"],
        "advantage/std": total["max_std"],
        "advantage/filtered_fraction": filtered,
        "advantage/filtered_positive": positive_share,
        "advantage/positive_kept": total["positive"] / total["tokens"],
        "advantage/negative_kept": total["negative"] / total["tokens"],
        "advantage/filtered_negative": filtered - positive_share,
        "advantage/balance": balance(total["evidence_for"], total["evidence_against"]),
    }


def balance(evidence_for: float, evidence_against: float) -> float:
    """(for - against) / (for + against), sums of |advantage| by sign: 0 is balanced, as every normalised batch is
    before a filter; +-1 is one-sided. Without any evidence 0."""
    total = evidence_for + evidence_against
    return (evidence_for - evidence_against) / total if total > 0 else 0.0
