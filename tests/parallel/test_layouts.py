"""Every layout gives the update of a single process: losses, gradient norms and exported weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from megatron_r1reward.checkpoint.gather import export_hf_tensors
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.parallel import setup
from megatron_r1reward.training.rollout_batch import shard_by_mini_batch
from megatron_r1reward.training.schedule import reduce_statistics, train_micro_batches
from megatron_r1reward.training.sft import cross_entropy
from megatron_r1reward.training.state import build_state
from megatron_r1reward.types import Prompt

pytestmark = pytest.mark.parallel

LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2xPP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "TP2xDP2": (4, {"tensor_model_parallel_size": 2}),
}


def two_steps(folder: Path, images: tuple[str, ...], parallel: dict[str, object], budget: int) -> dict[str, object]:
    """Two optimizer steps on eight sequences of unequal lengths, with and without images."""
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"path": str(folder), "precision": "fp32"},
            "data": {"train": "unused", "token_budget": budget},
            "optimizer": {"lr": 1e-3, "warmup_fraction": 0.0, "schedule": "constant", "clip_grad": 0.5},
            "parallel": parallel,
        }
    )
    topology = setup.initialize(config.parallel, seed=0)
    state = build_state(config, topology, optimizer_steps=2)
    sequences = []
    for number in range(8):
        paths = images[: number % 3] if number % 4 else ()
        text = (
            "<|im_start|>user\n" + "<|vision_start|><|image_pad|><|vision_end|>" * len(paths) + "Which digit?" * number
        )
        prompt = Prompt(
            id=str(number),
            preference_id=str(number),
            token_ids=tuple(state.tokenizer.encode(text)),
            image_paths=paths,
            label=1,
            swapped=False,
        )
        sequences.append(
            state.packer.sequence(prompt, state.tokenizer.encode("The image shows 7. " * (1 + number % 5)))
        )
    mine = shard_by_mini_batch(8, 1, topology.data_parallel_rank, topology.data_parallel_size)[0]
    records = []
    for _ in range(2):
        statistics, outcome = train_micro_batches(state, sequences, state.packer.plan(sequences, mine), cross_entropy)
        total = reduce_statistics(state, statistics)
        records.append((total["loss"] / total["tokens"], outcome.grad_norm))
    # numpy, because a tensor in a queue is shared memory that ends with its process
    weights = {name: w.numpy().copy() for name, w in export_hf_tensors(state.module, state.table, topology)}
    return {"records": records, "weights": weights if topology.is_main else None}


@pytest.fixture(scope="module")
def reference(tiny_folder: Path, image_paths: tuple[str, ...]) -> dict[str, object]:
    return run_ranks(two_steps, 1, tiny_folder, image_paths, {}, 100_000)[0]


def assert_same(got: dict[str, object], reference: dict[str, object]) -> None:
    assert torch.tensor(reference["records"]).isfinite().all()
    torch.testing.assert_close(torch.tensor(got["records"]), torch.tensor(reference["records"]), atol=1e-5, rtol=2e-5)
    for name, expected in reference["weights"].items():
        # Adam divides by |g|: where a gradient is nearly zero, rounding moves a weight by up to the learning rate.
        difference = np.abs(got["weights"][name] - expected)
        assert difference.mean() < 2e-6, name
        assert difference.max() < 2.1e-3, name


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_process(
    name: str, tiny_folder: Path, image_paths: tuple[str, ...], reference: dict[str, object]
) -> None:
    ranks, parallel = LAYOUTS[name]
    assert_same(run_ranks(two_steps, ranks, tiny_folder, image_paths, parallel, 400)[0], reference)


@pytest.mark.parametrize("budget", [1, 250, 600])
def test_micro_batching_changes_nothing(
    budget: int, tiny_folder: Path, image_paths: tuple[str, ...], reference: dict[str, object]
) -> None:
    assert_same(run_ranks(two_steps, 1, tiny_folder, image_paths, {}, budget)[0], reference)
