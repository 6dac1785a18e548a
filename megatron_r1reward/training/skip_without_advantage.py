"""Responses without any advantage are not run again: they add nothing to the gradient of an update.

Whole groups are idle where a group baseline leaves nothing (all samples of a prompt earned the same) and returns are
not normalized, and single responses where the filter rejects them. They stay in the denominator and in the metrics.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_r1reward.training.rollout_batch import RolloutBatch, every_sequence_counts
from megatron_r1reward.training.state import TrainState


def without_idle_sequences(state: TrainState, rollouts: RolloutBatch) -> tuple[RolloutBatch, dict[str, float]]:
    """The batch with only the sequences that train in its mini-batches, and what the others add to the statistics.

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
