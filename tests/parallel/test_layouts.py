"""Every layout gives the loss, log-probs and gradients of a single process over two optimizer steps, and so does every
way to cut a batch into micro-batches and ranks.

Every family in every layout of two ranks runs once: here, or on the second device. Layouts of four ranks combine
these: each is for one family here and for another one on the second device. `benchmarks/parallel_parity.py` has all
families in all layouts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import parallel_parity as parity
import pytest
import torch
from forked_ranks import run_ranks
from parity_layouts import EP2, LAYOUTS, Layout
from updates import ON_THE_SECOND_DEVICE

from megatron_r1reward.models.qwen2_5_vl.rotary import PackedMultimodalRotary
from megatron_r1reward.parallel import setup
from megatron_r1reward.training.data_parallel import zero_gradients
from megatron_r1reward.training.schedule import run_micro_batches
from megatron_r1reward.training.sft import cross_entropy

pytestmark = pytest.mark.parallel


def _families(name: str) -> list[str]:
    """Those that run here in a layout."""
    layout = LAYOUTS[name]
    others = [family for family in parity.FAMILIES if parity.applies(family, layout)]
    others.remove(ON_THE_SECOND_DEVICE[name])
    return others if layout.ranks == 2 else others[-1:]


CASES = [(family, name) for name in LAYOUTS for family in _families(name)]


@pytest.mark.parametrize(("family", "name"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_layout_equals_single_process(family, name, families, parity_images, parity_references) -> None:
    layout = LAYOUTS[name]
    got = run_ranks(parity.two_steps, layout.ranks, families[family], parity_images, layout)[0]
    row = parity.compare(got, parity_references[family])
    assert parity.within_goal(row), row


def test_megatron_cores_own_rotary_embedding_cannot_come_back_unnoticed(folder, parity_images) -> None:
    """The class that this package replaces slices once more for context parallelism."""
    with pytest.raises(AssertionError, match="in get_pos_emb_on_this_cp_rank"):
        run_ranks(_two_steps_with_upstream_rotary, 2, folder, parity_images, LAYOUTS["CP2"], 100_000)


def _two_steps_with_upstream_rotary(*args) -> parity.Trace:
    del PackedMultimodalRotary.forward  # this process is a fork: nothing else sees it
    return parity.two_steps(*args)


def _gradients_of_partitions(
    folder: Path, images: tuple[str, ...], seed: int, partitions: int, parallel: dict
) -> list[dict]:
    """Gradients of one batch under random partitions into micro-batches, also uneven ones and with empty ones."""
    layout = Layout(ranks=0, parallel={"use_distributed_optimizer": False} | parallel)
    state, sequences = parity.build(folder, images, layout, parity.BUDGET)
    topology = state.topology
    generator = np.random.default_rng(seed)
    found = []
    for number in range(partitions):
        owner = generator.integers(
            0, topology.data_parallel_size if number else 1, len(sequences)
        )  # alike on all ranks
        parts = generator.integers(0, 1 if number == 0 else len(sequences), len(sequences))
        plan = [
            [i for i in range(len(sequences)) if parts[i] == p and owner[i] == topology.data_parallel_rank]
            for p in range(len(sequences))
        ]
        zero_gradients(state.model)
        run_micro_batches(state, sequences, plan, cross_entropy, forward_only=False)
        found.append(parity.export_gradients(state))
    return found


@pytest.mark.parametrize(
    ("family", "ranks", "parallel"),
    [("qwen2_5_vl", 1, {}), ("qwen2_5_vl", 2, {}), ("qwen3_vl_moe", 2, EP2)],
    ids=["1_rank", "DP2", "experts_EP2"],
)
def test_any_split_into_micro_batches_and_ranks_gives_the_same_update(
    family, ranks, parallel, families, parity_images, parity_references
):
    """Property: the gradient of a batch depends on its sequences alone. Empty micro-batches and idle ranks included,
    also where ranks exchange tokens in every micro-batch."""
    reference = parity_references[family].gradients[0]
    floor = max(float(np.abs(g).max()) for g in reference.values())
    arguments = (families[family], parity_images, ranks, 6 if family == "qwen2_5_vl" else 3, parallel)
    for gradients in run_ranks(_gradients_of_partitions, ranks, *arguments)[0]:
        for name, expected in reference.items():
            scale = max(float(np.abs(expected).max()), parity.NEGLIGIBLE * floor)
            assert np.abs(gradients[name] - expected).max() < 3e-5 * scale, name


def _losses(folder: Path, images: tuple[str, ...], layout: Layout) -> list[bytes]:
    """Everything two steps produce, as bytes."""
    trace = parity.two_steps(folder, images, layout)
    flat = [g.tobytes() for step in trace.gradients for g in step.values()]
    return [np.array(trace.records).tobytes(), *flat]


def test_deterministic_runs_are_bitwise_equal(folder, parity_images) -> None:
    layout = replace(LAYOUTS["DP2 distributed optimizer"], precision={"deterministic": True})
    first, second = (run_ranks(_losses, 2, folder, parity_images, layout)[0] for _ in range(2))
    assert first == second


def _deterministic_flags() -> tuple[bool, str | None]:
    import os

    from megatron_r1reward.config.schema import ParallelSection

    setup.initialize(ParallelSection(), seed=0, deterministic=True)
    return torch.are_deterministic_algorithms_enabled(), os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO")


def test_deterministic_mode_reaches_torch_and_transformer_engine() -> None:
    assert run_ranks(_deterministic_flags, 1) == [(True, "0")]
