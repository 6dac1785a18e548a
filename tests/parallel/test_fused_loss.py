"""The loss inside the LM head trains like the plain one behind it, in every layout that splits rows or vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import parallel_parity as parity
import pytest
import torch
from forked_ranks import run_ranks
from parity_layouts import LAYOUTS, SINGLE, Layout

from megatron_r1reward.algorithm.policy_loss import aggregation_weights
from megatron_r1reward.training.policy_update import update_policy
from megatron_r1reward.training.rollout_batch import RolloutBatch, forward_log_probs

pytestmark = pytest.mark.parallel
PAPER = {"dual_clip": 3.0, "truncated_importance_sampling": 2.0, "clip_high": 0.28}
EVERY_ROW = {"kl_loss_coefficient": 0.1, "entropy_coefficient": 0.01, "aggregation": "token_mean"}
GSPO = {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.05}
METRICS = (
    "loss",
    "grad_norm",
    "ratio/mean",
    "ratio/max_abs_log",
    "ratio/preclipped_fraction",
    "ratio/clipped_fraction",
)


def _two_updates(folder: Path, images: tuple[str, ...], layout: Layout, algorithm: dict) -> tuple[list, dict]:
    """Metrics of two updates, and the weights after them."""
    state, sequences = parity.build(folder, images, layout, parity.BUDGET, algorithm=algorithm)
    topology = state.topology
    steps = [list(range(topology.data_parallel_rank, len(sequences), topology.data_parallel_size))]
    mine = steps[0]
    draws = [np.random.default_rng(i).normal(size=(4, sequences[i].response_length)) for i in mine]
    noise_4R = torch.tensor(np.concatenate(draws, 1), dtype=torch.float32)
    cu_response = torch.tensor([0, *(sequences[i].response_length for i in mine)]).cumsum(0)
    advantages_R = torch.where(noise_4R[1].abs() < 0.8, 0.0, noise_4R[1])  # most tokens of a step are of no use
    batch = RolloutBatch(
        sequences=tuple(sequences[i] for i in mine),
        mini_batches=(tuple(range(len(mine))),),
        rewards=torch.zeros(len(mine)),
        cu_response=cu_response,
        aggregation=aggregation_weights(cu_response, state.config.algorithm),
        sampler_log_probs=torch.zeros(0),
        advantages=advantages_R,
    )
    log_probs_R = forward_log_probs(state, batch, state.model)[0]
    if topology.is_last_stage:
        old_R, sampler_R, reference_R = (log_probs_R + 0.3 * noise_4R[row] for row in (0, 2, 3))
        batch = replace(batch, old_log_probs=old_R, sampler_log_probs=sampler_R, reference_log_probs=reference_R)
    metrics = []
    for _ in range(2):
        result = update_policy(state, batch)
        metrics.append([result[name] for name in METRICS])
    return metrics, {n: w.numpy().copy() for n, w in state.exporter.tensors()}


@pytest.fixture(scope="module")
def plain(folder: Path, parity_images: tuple[str, ...]) -> dict:
    return {
        name: run_ranks(_two_updates, 1, folder, parity_images, SINGLE, {**options, "fused_loss": False})[0]
        for name, options in (("paper", PAPER), ("every row", EVERY_ROW))
    }


@pytest.fixture(scope="module")
def gspo(folder: Path, parity_images: tuple[str, ...]) -> tuple[list, dict]:
    return run_ranks(_two_updates, 1, folder, parity_images, SINGLE, GSPO)[0]


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ("paper", "single"),
        ("every row", "single"),
        ("paper", "TP2+SP"),
        ("every row", "TP2+SP"),
        ("paper", "CP2"),
        ("paper", "PP2 VPP2"),
        ("paper", "DP2 distributed optimizer"),
    ],
)
def test_both_losses_train_alike(options: str, layout: str, folder, parity_images, plain) -> None:
    algorithm = PAPER if options == "paper" else EVERY_ROW
    chosen = SINGLE if layout == "single" else LAYOUTS[layout]
    metrics, weights = run_ranks(_two_updates, chosen.ranks, folder, parity_images, chosen, algorithm)[0]
    expected_metrics, expected_weights = plain[options]
    np.testing.assert_allclose(metrics, expected_metrics, rtol=2e-4, atol=1e-6)
    assert expected_metrics[0][5] > 0.01  # something was clipped
    assert all(math.isfinite(value) for row in metrics for value in row)
    for name, weight in expected_weights.items():
        assert np.abs(weights[name] - weight).max() < 2e-5, name


@pytest.mark.parametrize("layout", ["CP2", "DP2 distributed optimizer"])
def test_a_ratio_of_whole_responses_is_the_same_in_every_layout(layout: str, folder, parity_images, gspo) -> None:
    chosen = LAYOUTS[layout]
    metrics, weights = run_ranks(_two_updates, chosen.ranks, folder, parity_images, chosen, GSPO)[0]
    expected_metrics, expected_weights = gspo
    np.testing.assert_allclose(metrics, expected_metrics, rtol=2e-4, atol=1e-6)
    for name, weight in expected_weights.items():
        assert np.abs(weights[name] - weight).max() < 2e-5, name
