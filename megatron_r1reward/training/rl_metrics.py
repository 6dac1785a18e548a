"""What one RL step reports about its rollouts, advantages and the gap between sampler and trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_r1reward.algorithm.correction import mismatch_metrics
from megatron_r1reward.rollout.pool import GenerateResult, RolloutPool
from megatron_r1reward.training.rollout_batch import RolloutBatch
from megatron_r1reward.training.schedule import reduce_statistics
from megatron_r1reward.training.state import TrainState
from megatron_r1reward.types import ScoredRollout


def rollout_metrics(scored: Sequence[ScoredRollout], counts: Mapping[str, int]) -> dict[str, float]:
    """Means over the rollouts of one step; `counts` are those of `RewardScorer.score`.

    Raises:
        ValueError: there is no rollout.
    """
    if not scored:
        raise ValueError("no prompt of this step got a rollout: see the rollout servers' logs")
    total = len(scored)
    lengths = [len(item.rollout.token_ids) for item in scored]
    return {
        "reward/mean": sum(item.reward for item in scored) / total,
        "reward/format": sum(item.format_reward for item in scored) / total,
        "reward/result": sum(item.result_reward for item in scored) / total,
        "reward/consistency": sum(item.consistency_reward for item in scored) / total,
        "response/mean_tokens": sum(lengths) / total,
        "response/max_tokens": max(lengths),
        "response/truncated_fraction": sum(item.rollout.finish_reason == "length" for item in scored) / total,
        "rollout/answer_1_fraction": counts["answer_1"] / max(total - counts["unparsable"], 1),
        "rollout/unparsable_fraction": counts["unparsable"] / total,
        "judge/asked": counts["judge_asked"],
        "judge/consistent": counts["judge_consistent"],
        "judge/inconsistent": counts["judge_inconsistent"],
        "judge/unknown": counts["judge_unknown"],
        "judge/cached": counts["judge_cached"],
        "judge/over_budget": counts["judge_over_budget"],
        "judge/not_tried": counts["judge_not_tried"],
        "judge/steps_without": counts["judge_steps_without"],
    }


def server_metrics(generated: GenerateResult, pool: RolloutPool) -> dict[str, float]:
    """What the rollout servers went through to serve one step."""
    account, servers = generated.accounting, pool.status()
    return pool.sleep_metrics() | {
        "rollout/failed": account.failed,
        "rollout/quarantined": account.quarantined,
        "rollout/retried": account.retried,
        "rollout/withdrawn": account.withdrawn,
        "rollout/stale": account.stale,
        "servers/ready": sum(server.state == "ready" for server in servers),
        "servers/restarts": sum(server.restarts for server in servers),
    }


def mismatch(state: TrainState, batch: RolloutBatch) -> dict[str, float]:
    """The gap between the rollout servers' log-probs and the trainer's, over all ranks."""
    local: dict[str, float] = {}
    if state.topology.is_last_stage:
        assert batch.old_log_probs is not None and batch.entropy is not None
        tokens = batch.old_log_probs.numel()
        gap = mismatch_metrics(batch.old_log_probs, batch.sampler_log_probs)
        local = {
            "tokens": tokens,
            "abs": gap["mean_abs"] * tokens,
            "kl": gap["kl"] * tokens,
            "max_abs": gap["max_abs"],
            "entropy": float(batch.entropy.sum()),
        }
    total = reduce_statistics(state, [local])
    return {
        "mismatch/mean_abs": total["abs"] / total["tokens"],
        "mismatch/max_abs": total["max_abs"],
        "mismatch/kl": total["kl"] / total["tokens"],
        "entropy": total["entropy"] / total["tokens"],
    }


def advantage_metrics(state: TrainState, batch: RolloutBatch) -> dict[str, float]:
    """Statistics of the raw returns and the share of tokens the filter zeroed, by the sign of what it removed."""
    local: dict[str, float] = {}
    if state.topology.is_last_stage and state.topology.tensor_parallel_rank == 0:
        assert batch.filtered is not None
        lengths = batch.cu_response.diff()
        positive = (batch.rewards > batch.returns_mean).repeat_interleave(lengths)
        local = {
            "tokens": batch.filtered.numel(),
            "filtered": int(batch.filtered.sum()),
            "filtered_positive": int((batch.filtered & positive).sum()),
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
        "advantage/filtered_negative": filtered - positive_share,
    }
