"""Leaving out responses without any advantage changes neither the update nor its metrics, and saves their forward and
backward passes, also where a rank has no other responses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import parallel_parity as parity
import pytest
import torch
from forked_ranks import run_ranks
from parity_layouts import LAYOUTS, Layout

from megatron_r1reward.algorithm.policy_loss import aggregation_weights
from megatron_r1reward.checkpoint.weight_exporter import export_hf_tensors
from megatron_r1reward.training.policy_update import update_policy
from megatron_r1reward.training.rollout_batch import RolloutBatch, forward_log_probs

pytestmark = pytest.mark.parallel
SINGLE = Layout(ranks=1, parallel={"use_distributed_optimizer": False})
ACTIVE = (0, 2, 6)  # of eight sequences in two mini-batches: under DP2 all of rank 0, and the second step has one
NOT_COMPARED = ("tokens_per_second", "lr")


def _update(
    folder: Path, images: tuple[str, ...], layout: Layout, algorithm: dict, budget: int = parity.BUDGET
) -> tuple[dict, dict, int]:
    """Metrics of one update of two optimizer steps, the weights after it, and the sequences that this rank ran."""
    state, sequences = parity.build(folder, images, layout, budget, algorithm=algorithm)
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
    ran: list[int] = []
    first = state.module if topology.virtual_pipeline_parallel_size == 1 else state.module[0]
    first.register_forward_pre_hook(lambda module, inputs: ran.extend(inputs[0].sequence_indices))
    metrics = update_policy(state, batch)
    return metrics, {n: w.numpy().copy() for n, w in export_hf_tensors(state.module, state.table, topology)}, len(ran)


@pytest.fixture(scope="module")
def everything(folder: Path, parity_images: tuple[str, ...]) -> tuple[dict, dict, int]:
    return run_ranks(_update, 1, folder, parity_images, SINGLE, {"skip_idle_sequences": False})[0]


def test_any_token_budget_gives_the_same_update(folder, parity_images, everything) -> None:
    """One micro-batch per optimizer step against several."""
    _, weights, ran = run_ranks(_update, 1, folder, parity_images, SINGLE, {}, 100_000)[0]
    assert ran == len(ACTIVE)
    for key, weight in everything[1].items():
        assert np.abs(weights[key] - weight).max() < 2e-5, key


@pytest.mark.parametrize("name", ["single", "DP2 distributed optimizer", "PP2 VPP2"])
def test_the_update_is_the_same_without_idle_sequences(name, folder, parity_images, everything) -> None:
    layout = SINGLE if name == "single" else LAYOUTS[name]
    results = run_ranks(_update, layout.ranks, folder, parity_images, layout, {})
    metrics, weights, _ = results[0]
    expected_metrics, expected_weights, ran = everything
    assert ran == 8
    kept = {"single": [3], "DP2 distributed optimizer": [3, 2], "PP2 VPP2": [3, 3]}[name]
    assert [ran for *_, ran in results] == kept, "a rank without advantages keeps one sequence per step"
    assert metrics["update/idle_sequences"] == 8 - (sum(kept) if "DP2" in name else 3)
    for key in expected_metrics.keys() - {"update/idle_sequences", *NOT_COMPARED}:
        assert metrics[key] == pytest.approx(expected_metrics[key], rel=2e-4, abs=1e-6), key
    for key, weight in expected_weights.items():
        assert np.abs(weights[key] - weight).max() < 2e-5, key
