"""Optimizer steps on one rollout batch: what is left out of them, their loss, and what they report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_r1reward.algorithm.policy_loss import mismatch_metrics, policy_loss, truncated_importance_weights
from megatron_r1reward.kernels.linear_policy_loss import PolicyLossOutput
from megatron_r1reward.kernels.policy_loss.row_kernels import PolicyLossOptions, TokenInputs, count_flags
from megatron_r1reward.models.head import LossRequest
from megatron_r1reward.training.rollout_batch import RolloutBatch, every_sequence_counts
from megatron_r1reward.training.schedule import (
    Loss,
    LossOutput,
    LossRequestFn,
    StepOutcome,
    reduce_statistics,
    train_micro_batches,
)
from megatron_r1reward.training.state import TrainState
from megatron_r1reward.types import PackedBatch


def update_policy(state: TrainState, rollouts: RolloutBatch) -> dict[str, float]:
    """One optimizer step per mini-batch and pass; returns metrics averaged over them, the same on every rank."""
    started = time.monotonic()
    passes = state.config.rl.epochs_per_batch
    rollouts, left_out = without_idle_sequences(state, rollouts)
    loss, request = _loss(state, rollouts)
    totals, outcomes = optimizer_steps(state, rollouts, loss, request)
    totals.append({name: passes * value for name, value in left_out.items()})
    total = Counter(reduce_statistics(state, totals))
    return {
        "loss": total["loss"] / total["count"],
        "grad_norm": fmean(outcome.grad_norm for outcome in outcomes),
        "lr": outcomes[-1].lr,
        "update/skipped": sum(outcome.skipped for outcome in outcomes),
        "update/idle_sequences": total["idle_sequences"] / passes,
        "ratio/mean": total["ratio"] / total["tokens"],
        "ratio/max_abs_log": total["max_abs_log_ratio"],
        "ratio/preclipped_fraction": total["preclipped"] / total["tokens"],
        "ratio/clipped_fraction": total["clipped"] / total["tokens"],
        "tokens_per_second": total["all_tokens"] / (time.monotonic() - started),
    } | _mismatch(total)


def optimizer_steps(
    state: TrainState, rollouts: RolloutBatch, loss: Loss, request: LossRequestFn | None = None
) -> tuple[list[dict[str, float]], list[StepOutcome]]:
    """`rl.epochs_per_batch` passes over the mini-batches; statistics per micro-batch, outcomes per optimizer step."""
    totals, outcomes = [], []
    for indices in rollouts.mini_batches * state.config.rl.epochs_per_batch:
        micro_batches = state.packer.plan(rollouts.sequences, indices)
        statistics, outcome = train_micro_batches(state, rollouts.sequences, micro_batches, loss, request=request)
        totals += statistics
        outcomes.append(outcome)
    return totals, outcomes


def _gaps(state: TrainState, log_probs_R: torch.Tensor, old_log_probs_R: torch.Tensor) -> dict[str, float]:
    """Where the sampler's log-probs are the old ones, this is where the trainer's are seen first."""
    tokens = log_probs_R.numel()
    algorithm = state.config.algorithm
    if algorithm.old_log_probs != "sampler" or tokens == 0:
        return {}
    gap = mismatch_metrics(log_probs_R, old_log_probs_R, threshold=algorithm.mismatch_threshold)
    sums = {f"gap_{name}": gap[name] * tokens for name in ("mean_abs", "kl", "share_beyond")}
    return {"gap_tokens": tokens, "max_gap": gap["max_abs"], **sums}


def _mismatch(total: Mapping[str, float]) -> dict[str, float]:
    """`mismatch/*` over the tokens that had a gradient; nothing where `rl_metrics.mismatch` has measured it."""
    if "gap_tokens" not in total:
        return {}
    names = ("mean_abs", "kl", "share_beyond")
    shares = {f"mismatch/{name}": total[f"gap_{name}"] / total["gap_tokens"] for name in names}
    return {"mismatch/max_abs": total["max_gap"], **shares}


def _loss(state: TrainState, rollouts: RolloutBatch) -> tuple[Loss, LossRequestFn | None]:
    if not state.topology.is_last_stage:
        return no_loss, None
    return _fused_loss(state, rollouts) if state.config.algorithm.fuses_loss else (_plain_loss(state, rollouts), None)


def no_loss(output: object, batch: PackedBatch) -> LossOutput:
    raise AssertionError("only the last pipeline stage computes a loss")


def _fused_loss(state: TrainState, rollouts: RolloutBatch) -> tuple[Loss, LossRequestFn]:
    """StableReinforce inside the LM head: only rows with an advantage are multiplied, no [R, V] tensor."""
    assert rollouts.old_log_probs is not None and rollouts.advantages is not None
    options = PolicyLossOptions.from_config(state.config.algorithm)
    floor, ceiling = options.log_bounds[:2]
    needs_sampler = state.config.algorithm.truncated_importance_sampling is not None
    columns = {
        "old_log_probs": rollouts.old_log_probs,
        "advantages": rollouts.advantages,
        "weights": rollouts.aggregation.weights,
        "reference_log_probs": rollouts.reference_log_probs,
        "sampler_log_probs": rollouts.sampler_log_probs if needs_sampler else None,
    }

    def inputs(batch: PackedBatch) -> TokenInputs:
        rows = rollouts.rows(batch.sequence_indices)
        device = batch.targets.device
        mine = {name: None if column is None else column[rows].to(device) for name, column in columns.items()}
        return TokenInputs(targets=batch.targets, **mine)  # type: ignore[arg-type]

    def loss(result: PolicyLossOutput, batch: PackedBatch) -> LossOutput:
        given = inputs(batch)
        has_ratio_R = given.advantages.isfinite() & (given.advantages != 0) & (given.weights != 0)
        log_ratio_R = torch.where(has_ratio_R, result.log_probs - given.old_log_probs, 0.0).clamp(floor, ceiling)
        flags = count_flags(result.flags)
        statistics = {
            "loss": float(result.loss.sum()),
            "ratio": float(log_ratio_R.exp().sum()),
            "max_abs_log_ratio": float(log_ratio_R.abs().max()),
            "preclipped": flags["preclipped_low"] + flags["preclipped_high"],
            "clipped": flags["clipped_low"] + flags["clipped_high"],
        } | _gaps(state, result.log_probs[has_ratio_R], given.old_log_probs[has_ratio_R])
        return result.total, *counted(rollouts, batch, statistics)

    return loss, lambda batch: LossRequest(inputs=inputs(batch), options=options)


def _plain_loss(state: TrainState, rollouts: RolloutBatch) -> Loss:
    """In plain torch behind the head's log-probs: every loss, and the off switch of the fused one."""
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
        lengths_S = rollouts.cu_response.diff()[list(batch.sequence_indices)]
        result = policy_loss(
            output_2R[0],
            old_log_probs_R[rows].to(device),
            advantages_R[rows].to(device),
            algorithm,
            cu_response=torch.cat([lengths_S.new_zeros(1), lengths_S.cumsum(0)]),
            importance_weights_R=None if importance_R is None else importance_R[rows].to(device),
            entropy_R=output_2R[1],
            reference_log_probs_R=None if reference_R is None else reference_R[rows].to(device),
        )
        total = (rollouts.aggregation.weights[rows].to(device) * result.per_token_loss).sum()
        statistics = {
            "loss": float(total.detach()),
            "ratio": float(result.ratio.sum()),
            "max_abs_log_ratio": float(result.ratio.log().abs().max()),
            "preclipped": float((result.preclipped_low | result.preclipped_high).sum()),
            "clipped": float((result.clipped_low | result.clipped_high).sum()),
        } | _gaps(state, output_2R[0], old_log_probs_R[rows].to(device))
        return total, *counted(rollouts, batch, statistics)

    return loss


def counted(
    rollouts: RolloutBatch, batch: PackedBatch, statistics: dict[str, float]
) -> tuple[torch.Tensor, dict[str, float]]:
    """What the micro-batch adds to the denominator, and its statistics with the counts that divide them."""
    count = rollouts.aggregation.counts[list(batch.sequence_indices)].sum()
    sizes = {"count": float(count), "tokens": batch.targets.numel(), "all_tokens": batch.num_tokens}
    return count.int().to(batch.targets.device), statistics | sizes


def without_idle_sequences(state: TrainState, rollouts: RolloutBatch) -> tuple[RolloutBatch, dict[str, float]]:
    """Responses without any advantage add nothing to the gradient of an update and are not run again: groups whose
    samples all earned the same, where returns are not normalized, and responses that the filter rejects.

    The batch with only the sequences that train in its mini-batches, and what the others add to the statistics.

    The denominator stays: the first kept sequence of a mini-batch takes over the shares of those left out. Where this
    rank would have nothing to do, its shortest sequence stays.
    """
    if every_sequence_counts(state.config):
        return rollouts, {}
    idle_N = _idle_on_all_stages(state, rollouts)
    lengths_N = rollouts.cu_response.diff()
    counts_N = rollouts.aggregation.counts.clone()
    mini_batches, left_out = [], []
    for indices in rollouts.mini_batches:
        kept = [i for i in indices if not idle_N[i]] or [
            min(indices, key=lambda i: len(rollouts.sequences[i].token_ids))
        ]
        skipped = sorted(set(indices) - set(kept))
        counts_N[kept[0]] += rollouts.aggregation.counts[skipped].sum()
        mini_batches.append(tuple(kept))
        left_out += skipped
    tokens = float(lengths_N[left_out].sum())
    reduced = replace(
        rollouts,
        mini_batches=tuple(mini_batches),
        aggregation=replace(rollouts.aggregation, counts=counts_N),
    )
    # Tokens without an advantage have a ratio of 1 and are never clipped.
    return reduced, {"idle_sequences": float(len(left_out)), "tokens": tokens, "ratio": tokens}


def _idle_on_all_stages(state: TrainState, rollouts: RolloutBatch) -> list[bool]:
    """Which sequences have no advantage; the last pipeline stage, which has the advantages, tells the others."""
    topology = state.topology
    idle_N = torch.zeros(len(rollouts.sequences), dtype=torch.uint8)
    if topology.is_last_stage:
        assert rollouts.advantages is not None
        useful_R = (rollouts.advantages != 0) & rollouts.advantages.isfinite()
        parts = useful_R.split(rollouts.cu_response.diff().tolist())
        idle_N = torch.tensor([not bool(part.any()) for part in parts], dtype=torch.uint8)
    if topology.pipeline_parallel_size > 1:
        idle_N = idle_N.to(topology.device)
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(idle_N, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return [bool(flag) for flag in idle_N.tolist()]
