"""PPO with a critic, whole runs of a tiny model from a record: warmed up, stopped, exported, gone on with, refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_record import elsewhere, replay_config, write_made_up_record
from safetensors.torch import load_file

from megatron_r1reward.config.schema import ParallelSection, RunConfig
from megatron_r1reward.conversion.convert import export_folder, import_folder
from megatron_r1reward.conversion.inspect_folder import inspect
from megatron_r1reward.conversion.verify import verify
from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint
from megatron_r1reward.launch.stage_models import check_keys, check_models
from megatron_r1reward.models.registry import load_hf_config
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training import rl, rm

pytestmark = pytest.mark.slow
CRITIC = ("loss", "explained_variance", "value_mean", "clipped_fraction", "grad_norm", "lr", "skipped")


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.fixture(scope="module")
def whole(
    tiny_folder: Path, image_paths: tuple[str, ...], topology: Topology, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """A finished run of three steps, the first for the critic alone; a head of two layers."""
    config = replay_config(
        tmp_path_factory.mktemp("ppo"), tiny_folder,
        rl={"rollout_batch_size": 4, "train_batch_size": 2, "epochs_per_batch": 2},
        algorithm={"method": "ppo", "gae_lambda": 0.9, "kl_coefficient": 1e-3},
        critic={"score_layers": 2, "lr": 3e-3, "warmup_steps": 1, "value_clip": 0.05},
    )  # fmt: skip
    write_made_up_record(config, image_paths, image_token_id=load_hf_config(tiny_folder).image_token_id)
    assert rl.run(config, topology, None) is not None
    return config


def rows(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run.output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(config: RunConfig, folder: str) -> dict[str, torch.Tensor]:
    return load_file(config.run.output_dir / folder / "model.safetensors")


def test_the_critic_is_warmed_up_alone_and_learns(whole: RunConfig) -> None:
    first, *others = rows(whole)
    assert not {"loss", "grad_norm", "lr", "ratio/mean"} & set(first)
    assert first["mismatch/mean_abs"] > 0, "what is known before the update is still measured"
    for row in (first, *others):
        found = {name: row[f"critic/{name}"] for name in CRITIC}
        assert found["loss"] > 0
        assert found["grad_norm"] > 0
        assert found["lr"] == 3e-3
        assert found["skipped"] == 0
    assert any(row["critic/clipped_fraction"] > 0 for row in (first, *others))
    assert abs(first["critic/value_mean"]) < 0.1, "a new head begins near 0"
    assert others[-1]["critic/value_mean"] > first["critic/value_mean"] + 0.05, "half of the responses earned 1"
    assert all(row["grad_norm"] > 0 and row["lr"] == 1e-3 for row in others)
    assert others[0]["ratio/max_abs_log"] > 1e-4, "two passes over the batch"


def test_interrupted_while_it_is_warmed_up_it_goes_on_exactly(
    whole: RunConfig, topology: Topology, tmp_path: Path
) -> None:
    stopped = elsewhere(whole, tmp_path)
    stop = tmp_path / "live" / "stop.json"
    stop.parent.mkdir(parents=True)
    stop.write_text("{}")
    assert rl.run(stopped, topology, None) is None
    stop.unlink()
    rl.run(stopped, topology, None)
    for name in [f"critic/{name}" for name in CRITIC] + ["advantage/std"]:
        assert [row[name] for row in rows(stopped)] == [row[name] for row in rows(whole)], name
    for folder in ("hf", "critic"):
        mine, theirs = weights(stopped, folder), weights(whole, folder)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), folder


def test_the_critic_survives_conversion(whole: RunConfig, tmp_path: Path) -> None:
    """Exported as a folder with a scalar head; the checkpoint still is the policy to everybody else."""
    run = whole.run.output_dir
    assert json.loads((run / "DONE").read_text())["critic"] == str(run / "critic")
    assert inspect(run / "critic")["head"] == "scalar, two layers"
    assert not list(verify(run / "critic"))
    assert not (run / "critic" / "reward_model.json").exists(), "it is no reward model"
    import_folder(run / "critic", tmp_path / "megatron", progress=False)
    export_folder(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (run / "critic" / "model.safetensors").read_bytes()
    checkpoint = run / "checkpoints" / "step-00000003"
    assert not list(verify(checkpoint))
    assert (inspect(checkpoint)["head"], inspect(checkpoint)["critic"]) == ("lm", "scalar, two layers")
    for folder in ("hf", "critic"):
        export_folder(checkpoint, tmp_path / folder, progress=False, critic=folder == "critic")
        found, expected = load_file(tmp_path / folder / "model.safetensors"), weights(whole, folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(verify(tmp_path / "critic"))
    assert not (tmp_path / "critic" / "reward_model.json").exists()
    with pytest.raises(ValueError, match="holds no critic: leave --critic out"):
        export_folder(tmp_path / "megatron", tmp_path / "none", progress=False, critic=True)


def test_others_go_on_with_the_critic(whole: RunConfig, topology: Topology, tmp_path: Path) -> None:
    folder = whole.run.output_dir / "critic"
    again = elsewhere(whole, tmp_path, critic={"path": folder, "score_layers": None}, rl={"steps": 2})
    check_models(again.model_copy(update={"reward": again.reward.model_copy(update={"use_judge": False})}), "rl")
    rl.run(again, topology, None)
    assert rows(again)[0]["critic/value_mean"] > 0.05, "it expects something from the first token on"
    assert rm.head_layers(again.model_copy(update={"model": again.model.model_copy(update={"path": folder})})) == 2
    with pytest.raises(ValueError, match=r"critic.score_layers is 1, but the scalar head in .* has 2"):
        rl.run(elsewhere(again, tmp_path / "other", critic={"path": folder, "score_layers": 1}), topology, None)


def test_a_checkpoint_with_or_without_a_critic_is_what_it_is(
    whole: RunConfig, topology: Topology, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = elsewhere(
        whole, tmp_path, rl={"steps": 1}, algorithm={"advantage_estimator": "returns", "gae_lambda": 1.0},
        critic={"score_layers": None, "lr": None, "warmup_steps": 0, "value_clip": 0.2},
    )  # fmt: skip
    rl.run(plain, topology, None)
    assert not (tmp_path / "critic").exists()
    with pytest.raises(ValueError, match=r"was saved by a run without a critic: start another run.output_dir"):
        rl.run(elsewhere(whole, tmp_path), topology, None)
    shutil.copytree(whole.run.output_dir / "checkpoints", tmp_path / "with" / "checkpoints")
    one_more = elsewhere(plain, tmp_path / "with", rl={"steps": 3})
    with caplog.at_level(logging.WARNING):
        rl.run(one_more, topology, None)
    assert "holds a critic, and this run has none: its critic is left behind" in caplog.text


def test_a_critic_of_another_tokenizer_is_refused(whole: RunConfig, topology: Topology, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "other", corpus=["entirely other words, zebra quartz"] * 4, init_std=0.1)
    wrong = elsewhere(whole, tmp_path / "run", critic={"path": tmp_path / "other"})
    with pytest.raises(ValueError, match=r"critic.path .* has another tokenizer.* than model.path"):
        rl.run(wrong, topology, None)


def test_folders_and_keys_are_looked_at_before_anything_starts(whole: RunConfig, tmp_path: Path) -> None:
    missing = elsewhere(whole, tmp_path, critic={"path": tmp_path / "gone"})
    with pytest.raises(ValueError, match=r"critic.path .*gone cannot be used"):
        check_models(missing, "rl")
    with pytest.raises(ValueError, match=r"critic.score_layers.* mean nothing to `r1reward sft`"):
        check_keys(whole, "sft")
    check_keys(whole, "rl")


def test_masked_responses_teach_the_critic_nothing(
    whole: RunConfig, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they would have earned, its weights become the same."""
    taken, earned = rl.take_rollouts, 0.0

    def masked(*arguments: Any) -> Any:
        scored, shards, metrics = taken(*arguments)
        changed = [replace(one, reward=earned, masked=True) if n % 4 == 0 else one for n, one in enumerate(scored)]
        return changed, shards, metrics

    monkeypatch.setattr(rl, "take_rollouts", masked)
    found = []
    for earned in (0.0, 100.0):
        config = elsewhere(whole, tmp_path / str(earned), rl={"steps": 1}, critic={"warmup_steps": 0})
        rl.run(config, topology, None)
        found.append(weights(config, "critic"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], weights(whole, "critic")[name]) for name in found[0])
