"""A scalar reward model trains alike in every layout: loss, rewards, gradients and weights are those of one process,
on the
second device too (`test_second_device_scalar.py`)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import parallel_parity as parity
import pytest
from forked_ranks import run_ranks
from parity_layouts import LAYOUTS, SINGLE, Layout

from megatron_r1reward.training.data_parallel import zero_gradients
from megatron_r1reward.training.rm import bradley_terry, score_sequences
from megatron_r1reward.training.schedule import optimizer_step, reduce_statistics, run_micro_batches

pytestmark = pytest.mark.parallel
MARGIN = 0.5
# Every kind of parallelism once, the kinds of heads and the families by turns.
CASES: dict[str, tuple[str, int]] = {
    "TP2": ("qwen2_5_vl", 2),
    "TP2+SP": ("qwen2_5_vl", 2),
    "PP2 VPP2": ("qwen2_5_vl", 1),
    "CP2": ("qwen2_5_vl", 2),
    "DP2 distributed optimizer, overlap": ("qwen2_5_vl", 1),
    "PP2": ("qwen3_vl", 1),
    "TP2+SPxEP2": ("qwen3_vl_moe", 2),
    "TP2xCP2+SP images sharded": ("qwen2_5_vl", 1),
}


def two_steps(
    folder: Path,
    images: tuple[str, ...],
    layout: Layout,
    layers: int,
    budget: int = parity.BUDGET,
    with_gradients: bool = True,
) -> parity.Trace:
    """Two optimizer steps on four pairs; in place of log-probs the rewards before them."""
    state, sequences = parity.build(folder, images, layout, budget, score_layers=layers)
    topology = state.topology
    rewards = score_sequences(state, sequences)
    pairs = range(topology.data_parallel_rank, len(sequences) // 2, topology.data_parallel_size)
    mine = [sequences[i] for pair in pairs for i in (2 * pair, 2 * pair + 1)]
    records, gradients = [], []
    for _ in range(2):
        state.model.train()
        zero_gradients(state.model)
        state.optimizer.zero_grad()
        plan = state.packer.plan_pairs(mine)
        loss = partial(bradley_terry, margin=MARGIN)
        statistics = run_micro_batches(state, mine, plan, loss, forward_only=False, together=2)
        total = reduce_statistics(state, statistics)
        named = parity.export_gradients(state) if with_gradients else {}
        gradients.append(named if topology.is_main else {})
        records.append((total["loss"] / total["pairs"], optimizer_step(state).grad_norm))
    return parity.Trace(
        records=records, gradients=gradients, log_probs={i: np.array([reward]) for i, reward in enumerate(rewards)}
    )


@pytest.fixture(scope="module")
def references(families: dict[str, Path], parity_images: tuple[str, ...]) -> dict[tuple[str, int], parity.Trace]:
    return {
        (family, layers): run_ranks(two_steps, 1, families[family], parity_images, SINGLE, layers, 100_000)[0]
        for family, layers in sorted(set(CASES.values()))
    }


def check(got: parity.Trace, reference: parity.Trace) -> None:
    row = parity.compare(got, reference)
    assert parity.within_goal(row), row
    assert any(np.abs(gradient).max() > 0 for name, gradient in got.gradients[0].items() if name.startswith("score."))


@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "_"))
def test_a_layout_trains_as_one_process_does(name, families, parity_images, references) -> None:
    family, layers = CASES[name]
    layout = LAYOUTS[name]
    got = run_ranks(two_steps, layout.ranks, families[family], parity_images, layout, layers)[0]
    check(got, references[CASES[name]])


def test_the_loss_is_the_published_one(references) -> None:
    """In float64, from the rewards alone."""
    for reference in references.values():
        rewards = np.array([reference.log_probs[i][0] for i in range(parity.SEQUENCES)], dtype=np.float64)
        margins = rewards[::2] - rewards[1::2] - MARGIN
        assert reference.records[0][0] == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-6)
