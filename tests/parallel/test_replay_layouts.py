"""A recorded run on several ranks: whoever trains on which rollout, the update is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import run_ranks
from made_up_record import elsewhere, replay_config, write_made_up_record
from safetensors.torch import load_file

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.models.registry import load_hf_config
from megatron_r1reward.parallel import setup
from megatron_r1reward.training import rl

pytestmark = pytest.mark.parallel
UPDATE = ("loss", "grad_norm", "entropy", "ratio/max_abs_log", "advantage/std", "update/idle_sequences")


def _run(config: RunConfig) -> None:
    rl.run(config, setup.initialize(config.parallel, seed=0), None)


@pytest.fixture(scope="module")
def alone(folder: Path, parity_images: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """On one rank: groups, a third of them without any difference, and no normalization, so that these are idle."""
    config = replay_config(
        tmp_path_factory.mktemp("alone"), folder,
        rl={"steps": 2},
        algorithm={"samples_per_prompt": 3, "baseline": "leave_one_out", "normalize": "none", "filter": "none"},
    )  # fmt: skip
    write_made_up_record(config, parity_images, image_token_id=load_hf_config(folder).image_token_id)
    run_ranks(_run, 1, config)
    return config


def rows(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run.output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.run.output_dir / "hf" / "model.safetensors")


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["DP2", "PP2"])
def test_two_ranks_train_as_one(layout: dict[str, int], alone: RunConfig, tmp_path: Path) -> None:
    config = elsewhere(alone, tmp_path, parallel=layout, data={"token_budget": 300})
    run_ranks(_run, 2, config)
    for then, now in zip(rows(alone), rows(config), strict=True):
        assert then["update/idle_sequences"] > 0
        for name in UPDATE if layout else UPDATE[:-1]:  # a rank without any other keeps an idle one
            assert now[name] == pytest.approx(then[name], rel=1e-3, abs=1e-5), (then["step"], name)
        assert then["update/imbalance"] == 1.0
        assert 1.0 <= now["update/imbalance"] < 1.2
    before, after = weights(alone), weights(config)
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-4


def test_the_same_layout_repeats_itself(alone: RunConfig, tmp_path: Path) -> None:
    twice = [elsewhere(alone, tmp_path / name) for name in ("first", "second")]
    for config in twice:
        run_ranks(_run, 2, config)
    first, second = map(weights, twice)
    assert all(torch.equal(first[name], second[name]) for name in first)
