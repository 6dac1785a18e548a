"""What becomes of rewards on their way to the update: masked responses train nothing and shift nobody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rollouts import prompt, rollout, scored

from megatron_r1reward.algorithm.advantages import normalize_and_filter
from megatron_r1reward.algorithm.returns import task_returns
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.training.rollout_batch import RolloutBatch, pack


def packed(rewards: list[float | None], tmp_path: Path, **algorithm: Any) -> RolloutBatch:
    """One response of two tokens per reward, two samples of each prompt; None: masked."""
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": tmp_path}, "model": {"path": tmp_path}, "data": {"train": tmp_path / "train.jsonl"},
            "rl": {"rollout_batch_size": 4, "train_batch_size": 4},
            "algorithm": {"samples_per_prompt": 2, **algorithm},
        }
    )  # fmt: skip
    topology = SimpleNamespace(data_parallel_rank=0, data_parallel_size=1)
    packer = SimpleNamespace(sequence=lambda of, ids: SimpleNamespace(response_length=len(ids)))
    items = [
        replace(
            scored(rollout(prompt(f"p{index // 2}"), [0, 0], sample=index % 2)),
            reward=9.0 if reward is None else reward,
            masked=reward is None,
        )
        for index, reward in enumerate(rewards)
    ]
    state: Any = SimpleNamespace(config=config, topology=topology, packer=packer)
    return pack(state, items, [[list(range(len(items)))]])


def advantages(batch: RolloutBatch, tmp_path: Path) -> torch.Tensor:
    config = RunConfig.model_validate(
        {"run": {"output_dir": tmp_path}, "model": {"path": tmp_path}, "data": {"train": tmp_path / "train.jsonl"}}
    )
    return normalize_and_filter(task_returns(batch.rewards, batch.cu_response), config.algorithm).advantages


@pytest.mark.parametrize("baseline", ["none", "group_mean", "leave_one_out"])
def test_masked_responses_train_nothing_and_shift_nobody(baseline: str, tmp_path: Path) -> None:
    batch = packed([1.0, 0.0, None, 1.0, 0.0, 0.5], tmp_path, baseline=baseline)
    found = advantages(batch, tmp_path)
    assert found.isfinite().all()
    assert found[4:6].tolist() == [0.0, 0.0]
    assert batch.aggregation.weights[4:6].tolist() == [0.0, 0.0]
    assert batch.aggregation.weights[:4].min() > 0
    assert batch.aggregation.counts.tolist() == packed([1.0] * 6, tmp_path).aggregation.counts.tolist()
    if baseline == "none":
        others = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5])
        expected = (others - others.mean()) / others.std(correction=0)
        assert found[[0, 2, 6, 8, 10]].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_batch_of_nothing_but_masked_responses_is_harmless(tmp_path: Path) -> None:
    batch = packed([None] * 4, tmp_path, baseline="group_mean", group_normalize=True)
    assert advantages(batch, tmp_path).tolist() == [0.0] * 8
