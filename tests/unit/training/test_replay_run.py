"""Whole RL runs of a tiny model from a record, without servers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_record import elsewhere, replay_config, write_made_up_record
from safetensors.torch import load_file

from megatron_r1reward.config.methods import METHODS
from megatron_r1reward.config.schema import ParallelSection, RunConfig
from megatron_r1reward.models.registry import load_hf_config
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training import rl, rollout_batch

UPDATE = ("loss", "grad_norm", "lr", "entropy", "ratio/mean", "ratio/max_abs_log", "advantage/std", "mismatch/mean_abs")


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.fixture(scope="module")
def first(
    tiny_folder: Path, image_paths: tuple[str, ...], topology: Topology, tmp_path_factory: pytest.TempPathFactory
) -> RunConfig:
    """A finished run."""
    config = replay_config(tmp_path_factory.mktemp("replay"), tiny_folder)
    write_made_up_record(config, image_paths, image_token_id=load_hf_config(tiny_folder).image_token_id)
    assert rl.run(config, topology, None) is not None
    return config


def rows(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run.output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.run.output_dir / "hf" / "model.safetensors")


@pytest.mark.slow
def test_the_same_record_gives_the_same_weights(first: RunConfig, topology: Topology, tmp_path: Path) -> None:
    again = elsewhere(first, tmp_path)
    rl.run(again, topology, None)
    assert [row["step"] for row in rows(again)] == [1, 2, 3]
    for then, now in zip(rows(first), rows(again), strict=True):
        assert {name: now[name] for name in UPDATE} == {name: then[name] for name in UPDATE}
        assert now["grad_norm"] > 0
        assert "servers/ready" not in now
    before, after = weights(first), weights(again)
    assert all(torch.equal(before[name], after[name]) for name in before)
    original = load_file(first.model.path / "model.safetensors")
    assert any(not torch.equal(original[name], after[name]) for name in original), "something was learned"


@pytest.mark.slow
def test_another_micro_batch_budget_changes_rounding_only(first: RunConfig, topology: Topology, tmp_path: Path) -> None:
    again = elsewhere(first, tmp_path, data={"token_budget": 150})
    rl.run(again, topology, None)
    for then, now in zip(rows(first), rows(again), strict=True):
        for name in UPDATE:
            assert now[name] == pytest.approx(then[name], rel=1e-3, abs=1e-5), (then["step"], name)
    before, after = weights(first), weights(again)
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-4


@pytest.mark.slow
def test_a_replay_goes_on_after_an_interruption(first: RunConfig, topology: Topology, tmp_path: Path) -> None:
    """Asked to stop after the first step, then started again: the weights of the run that was left alone."""
    again = elsewhere(first, tmp_path)
    stop = tmp_path / "live" / "stop.json"
    stop.parent.mkdir()
    stop.write_text("{}")
    assert rl.run(again, topology, None) is None
    stop.unlink()
    (again.rl.replay / "step-00000001.jsonl").rename(tmp_path / "kept")  # type: ignore[operator]
    try:
        rl.run(again, topology, None)
    finally:
        (tmp_path / "kept").rename(again.rl.replay / "step-00000001.jsonl")  # type: ignore[operator]
    assert [row["step"] for row in rows(again)] == [1, 2, 3]
    before, after = weights(first), weights(again)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_several_passes_over_a_batch(first: RunConfig, topology: Topology, tmp_path: Path) -> None:
    """The policy leaves the one that sampled; the denominator stays whole also where idle responses are left out."""
    found = {}
    for name, passes, skip in (("one", 1, True), ("two", 2, True), ("all", 2, False)):
        again = elsewhere(
            first,
            tmp_path / name,
            rl={"train_batch_size": 8, "epochs_per_batch": passes},
            algorithm={"skip_idle_sequences": skip},
        )
        rl.run(again, topology, None)
        found[name] = rows(again)
    assert all(row["ratio/max_abs_log"] < 1e-5 for row in found["one"]), "one optimizer step, by the old weights"
    assert all(row["ratio/max_abs_log"] > 1e-4 for row in found["two"])
    for with_idle, without in zip(found["all"], found["two"], strict=True):
        for name in UPDATE:
            assert without[name] == pytest.approx(with_idle[name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_a_step_that_is_missing_is_noticed_at_the_start(first: RunConfig, topology: Topology, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks 2 of the steps 1 to 5, the first is 4: set rl.steps to at most 3"):
        rl.run(elsewhere(first, tmp_path, rl={"steps": 5}), topology, None)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_the_samplers_log_probs_spare_a_pass_over_the_batch(
    first: RunConfig, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a record's log-probs are the trainer's own, the updates are the same to the last bit, without that pass."""
    one_update = {"rl": {"train_batch_size": 8}, "rollout": {"dtype": "float32"}}
    computed: list[torch.Tensor] = []
    forward_log_probs = rollout_batch.forward_log_probs

    def remember(*arguments: Any) -> torch.Tensor:
        computed.append(forward_log_probs(*arguments)[0].clone())
        return torch.stack([computed[-1], torch.zeros_like(computed[-1])])

    monkeypatch.setattr(rollout_batch, "forward_log_probs", remember)
    slow = elsewhere(first, tmp_path / "slow", **one_update)
    rl.run(slow, topology, None)
    assert len(computed) == 3

    fast = elsewhere(slow, tmp_path / "fast", algorithm={"old_log_probs": "sampler"}, rl={"replay": tmp_path / "own"})
    _with_log_probs(first.rl.replay, fast.rl.replay, computed)  # type: ignore[arg-type]
    rl.run(fast, topology, None)
    assert len(computed) == 3, "no log-probs were computed before the update"
    before, after = weights(slow), weights(fast)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for then, now in zip(rows(slow), rows(fast), strict=True):
        assert now["loss"] == then["loss"]
        assert now["mismatch/max_abs"] == now["ratio/max_abs_log"] < 1e-3
        assert "entropy" not in now


def _with_log_probs(record: Path, changed: Path, log_probs: list[torch.Tensor]) -> None:
    """The record with the trainer's log-probs in the places of the sampler's."""
    shutil.copytree(record, changed)
    for path, flat_R in zip(sorted(changed.glob("step-*")), log_probs, strict=True):
        head, *lines = path.read_text().splitlines()
        items, start = list(map(json.loads, lines)), 0
        for item in items:  # one rank and one mini-batch: in the order of the batch
            end = start + len(item["rollout"]["token_ids"])
            item["rollout"]["log_probs"] = flat_R[start:end].tolist()
            start = end
        assert start == flat_R.numel()
        path.write_text("\n".join([head, *map(json.dumps, items)]) + "\n")


def test_samples_of_older_weights_have_no_log_probs_to_reuse(
    first: RunConfig, topology: Topology, tmp_path: Path
) -> None:
    config = elsewhere(first, tmp_path / "run", rl={"train_batch_size": 8, "replay": tmp_path / "old"},
                       rollout={"dtype": "float32"}, algorithm={"old_log_probs": "sampler"})  # fmt: skip
    shutil.copytree(first.rl.replay, tmp_path / "old")  # type: ignore[arg-type]
    path = tmp_path / "old" / "step-00000002.jsonl"
    path.write_text(path.read_text().replace('"version":1', '"version":0', 1))
    with pytest.raises(ValueError, match="1 of 8 rollouts of step 2 were sampled by other weights than those that are"):
        rl.run(config, topology, None)


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("rl", "train_batch_size", 4, "rl.train_batch_size 4 is below rl.rollout_batch_size 8"),
        ("rollout", "dtype", "auto", "rollout.dtype 'auto' is not model.precision 'fp32': set it to 'float32'"),
        ("rollout", "quantization", "fp8", "rollout.quantization 'fp8' is another precision"),
        ("algorithm", "truncated_importance_sampling", 2.0, "would be 1 for all"),
        ("critic", "warmup_steps", 1, "critic.warmup_steps 1 leaves out updates, which measure the gap"),
    ],
)
def test_where_the_samplers_log_probs_are_not_the_trainers(
    section: str, key: str, value: object, reason: str, tmp_path: Path
) -> None:
    sections: dict[str, dict[str, Any]] = {
        "rl": {"train_batch_size": 8}, "rollout": {"dtype": "float32"}, "algorithm": {"old_log_probs": "sampler"}
    }  # fmt: skip
    replay_config(tmp_path, tmp_path, **sections)
    sections[section] = sections.get(section, {}) | {key: value}
    with pytest.raises(ValueError, match=reason):
        replay_config(tmp_path, tmp_path, **sections)


# One of each kind: KL in the reward, KL in the loss, overlong shaping, the four losses, terms on their own, a critic.
KINDS = ("released_code_constant_length", "reinforce_plus_plus", "grpo", "dapo", "gspo", "cispo", "sapo", "gdpo", "ppo")


@pytest.mark.slow
@pytest.mark.parametrize("method", KINDS)
def test_a_method_trains_by_one_key_and_goes_on_exactly_after_an_interruption(
    method: str, tiny_folder: Path, image_paths: tuple[str, ...], topology: Topology, tmp_path: Path
) -> None:
    """Two optimizer steps for each of two batches; the second run is stopped between these."""
    algorithm: dict[str, Any] = {"method": method, "mismatch_alarm": 100.0, "mismatch_share_alarm": 1.0}
    if "algorithm.samples_per_prompt" in METHODS[method]:
        algorithm["samples_per_prompt"] = 2
    steps = {"steps": 2, "rollout_batch_size": 4, "train_batch_size": 2, "replay": tmp_path / "record"}
    config = replay_config(tmp_path / "whole", tiny_folder, algorithm=algorithm, rl=steps)
    write_made_up_record(config, image_paths, image_token_id=load_hf_config(tiny_folder).image_token_id)
    rl.run(config, topology, None)
    assert all(row["grad_norm"] > 0 for row in rows(config))
    original = load_file(tiny_folder / "model.safetensors")
    trained = weights(config)
    assert any(not torch.equal(original[name], weight) for name, weight in trained.items())
    stopped = elsewhere(config, tmp_path / "stopped")
    stop = tmp_path / "stopped" / "live" / "stop.json"
    stop.parent.mkdir(parents=True)
    stop.write_text("{}")
    assert rl.run(stopped, topology, None) is None
    stop.unlink()
    rl.run(stopped, topology, None)
    assert [row["loss"] for row in rows(stopped)] == [row["loss"] for row in rows(config)]
    assert all(torch.equal(trained[name], weight) for name, weight in weights(stopped).items())
