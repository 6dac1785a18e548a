"""What a rank runs where updates are compared: two policy steps on made-up advantages, then a step of SFT."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import parallel_parity as parity
import torch
from parity_layouts import LAYOUTS, Layout

from megatron_r1reward.algorithm.policy_loss import aggregation_weights
from megatron_r1reward.training.data_parallel import synchronize_parameters
from megatron_r1reward.training.policy_update import update_policy
from megatron_r1reward.training.rollout_batch import RolloutBatch, forward_log_probs
from megatron_r1reward.training.schedule import reduce_statistics, train_micro_batches
from megatron_r1reward.training.sft import cross_entropy
from megatron_r1reward.training.state import TrainState

# The family that trains in a layout on the second device (`test_second_device_layouts.py`); all take part in each kind
# of parallelism. The other families are compared on the CPU (`test_layouts.py`).
ON_THE_SECOND_DEVICE = {
    **{name: "qwen3_vl_moe" if layout.needs_experts else "qwen2_5_vl" for name, layout in LAYOUTS.items()},
    "PP2": "qwen3_vl",
    "CP2 images sharded": "qwen3_vl",
    "CP2 selective recompute": "qwen3_vl",
    "TP2 full recompute": "qwen3_vl",
    "PP2 vision balanced": "qwen3_vl",
    "TP2+SP": "qwen3_vl_moe",
    "CP2xDP2 overlap": "qwen3_vl",
    "TP2+SPxPP2 VPP2": "qwen3_vl",
}
ACTIVE = (0, 2, 6)  # of eight sequences in two mini-batches: under DP2 all of rank 0, and the second step has one


@dataclass(frozen=True, kw_only=True)
class Updated:
    """Metrics of one update of two optimizer steps, the loss of the SFT step after it, the weights after that by their
    Hugging Face names, and how many sequences this rank ran in the update."""

    metrics: dict[str, float]
    sft_loss: float
    weights: dict[str, np.ndarray]
    ran: int


def rollout_batch(state: TrainState, sequences: list) -> RolloutBatch:
    """This rank's share of eight rollouts; log-probs and advantages on the last stage."""
    topology = state.topology
    shards = [
        list(range(a, b))[topology.data_parallel_rank :: topology.data_parallel_size] for a, b in ((0, 4), (4, 8))
    ]
    mine = [i for shard in shards for i in shard]
    cu_response = torch.tensor([0, *(sequences[i].response_length for i in mine)]).cumsum(0)
    signs = torch.tensor([(-1.0) ** (i // 2) if i in ACTIVE else 0.0 for i in mine])
    sizes = [len(shard) for shard in shards]
    batch = RolloutBatch(
        sequences=tuple(sequences[i] for i in mine),
        mini_batches=(tuple(range(sizes[0])), tuple(range(sizes[0], sum(sizes)))),
        rewards=torch.zeros(len(mine)),
        cu_response=cu_response,
        aggregation=aggregation_weights(cu_response, state.config.algorithm),
        sampler_log_probs=torch.zeros(0),
    )
    log_probs_R = forward_log_probs(state, batch, state.model)[0]
    if topology.is_last_stage:
        advantages_R = signs.repeat_interleave(cu_response.diff())
        batch = replace(batch, old_log_probs=log_probs_R - 0.1, advantages=advantages_R)
    return batch


def update_and_sft_step(
    folder: Path, images: tuple[str, ...], layout: Layout, algorithm: dict, budget: int = parity.BUDGET
) -> Updated:
    state, sequences = parity.build(folder, images, layout, budget, algorithm=algorithm)
    topology = state.topology
    batch = rollout_batch(state, sequences)
    ran: list[int] = []
    first = state.module if topology.virtual_pipeline_parallel_size == 1 else state.module[0]
    hook = first.register_forward_pre_hook(lambda module, inputs: ran.extend(inputs[0].sequence_indices))
    metrics = update_policy(state, batch)
    hook.remove()
    mine = list(range(topology.data_parallel_rank, len(sequences), topology.data_parallel_size))
    plan = state.packer.plan(sequences, mine)
    statistics, _ = train_micro_batches(state, sequences, plan, cross_entropy)
    total = reduce_statistics(state, statistics)
    synchronize_parameters(state.model)
    return Updated(
        metrics=metrics,
        sft_loss=total["loss"] / total["tokens"],
        weights={name: weight.cpu().numpy().copy() for name, weight in state.exporter.tensors()},
        ran=len(ran),
    )
