"""Optimizer steps on one rollout batch, and what they report."""

from __future__ import annotations

import time
from collections import Counter

import torch

from megatron_r1reward.algorithm.correction import truncated_importance_weights
from megatron_r1reward.algorithm.policy_loss import policy_loss
from megatron_r1reward.training.rollout_batch import RolloutBatch
from megatron_r1reward.training.schedule import Loss, LossOutput, reduce_statistics, train_micro_batches
from megatron_r1reward.training.state import TrainState
from megatron_r1reward.types import PackedBatch


def _loss(state: TrainState, rollouts: RolloutBatch) -> Loss:
    """StableReinforce on one micro-batch: the weighted sum of token losses and its share of the denominator."""
    algorithm = state.config.algorithm
    assert rollouts.old_log_probs is not None and rollouts.advantages is not None
    old_log_probs_R, advantages_R = rollouts.old_log_probs, rollouts.advantages
    reference_R = rollouts.reference_log_probs
    importance_R = None
    if algorithm.truncated_importance_sampling is not None:
        importance_R = truncated_importance_weights(
            old_log_probs_R, rollouts.sampler_log_probs, algorithm.truncated_importance_sampling
        )

    def loss(output_2R: torch.Tensor, batch: PackedBatch) -> LossOutput:
        device = output_2R.device
        rows = rollouts.rows(batch.sequence_indices)
        result = policy_loss(
            output_2R[0],
            old_log_probs_R[rows].to(device),
            advantages_R[rows].to(device),
            algorithm,
            importance_weights_R=None if importance_R is None else importance_R[rows].to(device),
            entropy_R=output_2R[1],
            reference_log_probs_R=None if reference_R is None else reference_R[rows].to(device),
        )
        total = (rollouts.aggregation.weights[rows].to(device) * result.per_token_loss).sum()
        count = rollouts.aggregation.counts[list(batch.sequence_indices)].sum()
        statistics = {
            "loss": float(total.detach()),
            "count": float(count),
            "tokens": batch.targets.numel(),
            "all_tokens": batch.num_tokens,
            "ratio": float(result.ratio.sum()),
            "max_abs_log_ratio": float(result.ratio.log().abs().max()),
            "preclipped": float((result.preclipped_low | result.preclipped_high).sum()),
            "clipped": float((result.clipped_low | result.clipped_high).sum()),
        }
        return total, count.int().to(device), statistics

    return loss


def update_policy(state: TrainState, rollouts: RolloutBatch) -> dict[str, float]:
    """One optimizer step per mini-batch; returns metrics averaged over them, the same on every rank."""
    started = time.monotonic()
    totals: list[dict[str, float]] = []
    norms, skipped = [], 0
    loss = _loss(state, rollouts) if state.topology.is_last_stage else _no_loss
    for indices in rollouts.mini_batches:
        micro_batches = state.packer.plan(rollouts.sequences, indices)
        statistics, outcome = train_micro_batches(state, rollouts.sequences, micro_batches, loss)
        totals += statistics
        norms.append(outcome.grad_norm)
        skipped += outcome.skipped
    total = Counter(reduce_statistics(state, totals))
    return {
        "loss": total["loss"] / total["count"],
        "grad_norm": sum(norms) / len(norms),
        "lr": outcome.lr,
        "update/skipped": skipped,
        "ratio/mean": total["ratio"] / total["tokens"],
        "ratio/max_abs_log": total["max_abs_log_ratio"],
        "ratio/preclipped_fraction": total["preclipped"] / total["tokens"],
        "ratio/clipped_fraction": total["clipped"] / total["tokens"],
        "tokens_per_second": total["all_tokens"] / (time.monotonic() - started),
    }


def _no_loss(output_2R: torch.Tensor, batch: PackedBatch) -> LossOutput:
    raise AssertionError("only the last pipeline stage computes a loss")
