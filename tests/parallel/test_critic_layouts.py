"""PPO with a critic on several ranks: values, losses, gradient norms and both models are those of one process, also
where the layout changes between two steps, and on the second device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import parallel_parity as parity
import pytest
import torch
from forked_ranks import run_ranks
from made_up_record import elsewhere, replay_config, write_made_up_record
from parity_layouts import LAYOUTS, SINGLE, Layout
from safetensors.torch import load_file
from test_second_device import ALLOWED_WAITS
from updates import rollout_batch

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.models.registry import load_hf_config
from megatron_r1reward.parallel import setup
from megatron_r1reward.training import rl
from megatron_r1reward.training.critic import add_critic, update_critic
from megatron_r1reward.training.policy_update import update_policy
from megatron_r1reward.training.rollout_batch import add_advantages, add_values

pytestmark = pytest.mark.parallel
CRITIC = ("loss", "explained_variance", "value_mean", "clipped_fraction", "grad_norm")
COMPARED = ("loss", "grad_norm", "entropy", "advantage/mean", "advantage/std", *(f"critic/{name}" for name in CRITIC))


def _run(config: RunConfig) -> None:
    rl.run(config, setup.initialize(config.parallel, seed=0), None)


@pytest.fixture(scope="module")
def alone(folder: Path, parity_images: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """On one rank, everything in one micro-batch; the second step's values are those of a critic that was trained."""
    config = replay_config(
        tmp_path_factory.mktemp("alone"), folder,
        rl={"steps": 2, "epochs_per_batch": 2},
        algorithm={"method": "ppo", "gae_lambda": 0.9},
        critic={"score_layers": 2, "value_clip": 0.02},
        optimizer={"eps": 1e-5},
    )  # fmt: skip
    write_made_up_record(config, parity_images, image_token_id=load_hf_config(folder).image_token_id)
    run_ranks(_run, 1, config)
    return config


def rows(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run.output_dir / "metrics.jsonl").read_text().splitlines()]


def check(config: RunConfig, alone: RunConfig) -> None:
    for then, now in zip(rows(alone), rows(config), strict=True):
        for name in COMPARED:
            assert now[name] == pytest.approx(then[name], rel=1e-3, abs=1e-5), (then["step"], name)
        assert then["critic/clipped_fraction"] > 0
    for name in ("hf", "critic"):
        found, expected = (load_file(run.run.output_dir / name / "model.safetensors") for run in (config, alone))
        assert max(float((found[key] - expected[key]).abs().max()) for key in expected) < 1e-4, name
    began = load_file(alone.model.path / "model.safetensors")
    assert any(not torch.equal(began[key], expected[key]) for key in began.keys() & expected.keys()), "its body learns"


@pytest.mark.parametrize("name", ["DP2", "PP2", "CP2"])
def test_two_ranks_train_as_one(name: str, alone: RunConfig, tmp_path: Path) -> None:
    config = elsewhere(alone, tmp_path, parallel=LAYOUTS[name].parallel, data={"token_budget": 300})
    run_ranks(_run, 2, config)
    check(config, alone)


def test_the_layout_changes_between_two_steps(alone: RunConfig, tmp_path: Path) -> None:
    """Stopped after the first on two data-parallel ranks, which share the optimizers, gone on with on tensor-parallel
    ones: weights and moments of both models are cut anew."""
    stop = tmp_path / "live" / "stop.json"
    stop.parent.mkdir()
    stop.write_text("{}")
    run_ranks(_run, 2, elsewhere(alone, tmp_path, data={"token_budget": 300}))
    assert not (tmp_path / "DONE").exists()
    stop.unlink()
    config = elsewhere(alone, tmp_path, parallel=LAYOUTS["TP2+SP"].parallel, data={"token_budget": 300})
    run_ranks(_run, 2, config)
    check(config, alone)


def one_step(folder: Path, images: tuple[str, ...], layout: Layout, budget: int) -> dict[str, float]:
    sections = {"algorithm": {"method": "ppo", "gae_lambda": 0.9}, "critic": {"score_layers": 2}}
    state, sequences = parity.build(folder, images, layout, budget, **sections)
    add_critic(state)
    batch = rollout_batch(state, sequences)
    rewards = torch.tensor([float(one.response_length % 2) for one in batch.sequences])
    batch = add_advantages(state, add_values(state, replace(batch, rewards=rewards)))
    return update_critic(state, batch) | update_policy(state, batch)


def _on_the_device(*arguments: Any) -> tuple[dict[str, float], set[str]]:
    import second_device

    second_device.install()
    with second_device.Rules():
        metrics = one_step(*arguments)
    return metrics, set(second_device.waits)


def test_it_trains_on_a_device_with_the_numbers_of_a_cpu(folder: Path, parity_images: tuple[str, ...]) -> None:
    expected = run_ranks(one_step, 1, folder, parity_images, SINGLE, 100_000)[0]
    found = run_ranks(_on_the_device, 2, folder, parity_images, LAYOUTS["TP2+SP"], parity.BUDGET)
    metrics = found[0][0]
    for name in ("loss", "grad_norm", *(f"critic/{name}" for name in CRITIC)):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    waits = set.union(*(waits for _, waits in found))
    ours = "training/critic.py::loss"  # what an update reports, and its inputs, once per micro-batch
    assert not {place for place in waits if not place.startswith((*ALLOWED_WAITS, ours))}
