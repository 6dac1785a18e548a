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


def run_that_collapses(config: RunConfig) -> None:
    """What is measured after step 2 says that the model no longer answers, as long as the rate is what it was."""
    train_step, rate = rl.train_step, config.optimizer.lr

    def step(state: Any, *given: Any) -> dict[str, float]:
        metrics = train_step(state, *given)
        gone = state.step > 2 and metrics["lr"] > 0.9 * rate
        return metrics | {"rollout/answer_1_fraction": 0.5, "rollout/unparsable_fraction": float(gone)}

    rl.train_step = step  # this process is a fork: nothing else sees it
    _run(config)


@pytest.fixture(scope="module")
def went_back(folder: Path, parity_images: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = replay_config(
        tmp_path_factory.mktemp("went-back"), folder,
        rl={"steps": 4, "rollout_batch_size": 4, "train_batch_size": 4},
        checkpoint={"save_every": 1, "keep_last": 1},
        health={"policy": "rollback", "patience": 1, "rollback_factor": 0.25, "max_rollbacks": 1},
    )  # fmt: skip
    write_made_up_record(config, parity_images, image_token_id=load_hf_config(folder).image_token_id)
    run_ranks(run_that_collapses, 1, config)
    return config


@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["DP2", "PP2"])
def test_ranks_go_back_together(layout: dict[str, int], went_back: RunConfig, tmp_path: Path) -> None:
    """To the same checkpoint, each with its own part of the optimizer's state: what follows is one rank's training."""
    config = elsewhere(went_back, tmp_path, parallel=layout)
    run_ranks(run_that_collapses, 2, config)
    check_both_went_back(went_back, config)


def check_both_went_back(went_back: RunConfig, config: RunConfig) -> None:
    (then,), (now,) = (
        json.loads((run.run.output_dir / "checkpoints" / "rollbacks.json").read_text()) for run in (went_back, config)
    )
    assert {name: now[name] for name in ("step", "began", "to", "done")} == {
        "step": 3,
        "began": 3,
        "to": 1,
        "done": True,
    }
    assert now["to"] == then["to"]
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4]
    for before, after in zip(rows(went_back), rows(config), strict=True):
        for name in ("loss", "grad_norm", "lr", "health/rollbacks"):
            assert after[name] == pytest.approx(before[name], rel=1e-3, abs=1e-5), (before["step"], name)
    ours, theirs = weights(config), weights(went_back)
    assert (
        max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 2e-4
    )  # a fifth of a step at this rate
