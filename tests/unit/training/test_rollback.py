"""`health.policy = "rollback"`: whole runs of a tiny model from a record go back, lower their rate, go on exactly."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_record import elsewhere, replay_config, write_made_up_record
from safetensors.torch import load_file
from test_alarms import CAUSES, LEARNING

from megatron_r1reward.checkpoint.manifest import write_manifest
from megatron_r1reward.checkpoint.saver import expired
from megatron_r1reward.config.schema import CheckpointSection, ParallelSection, RunConfig
from megatron_r1reward.models.registry import load_hf_config
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training import rl, rollback
from megatron_r1reward.training.alarms import SignalGoneError

pytestmark = pytest.mark.slow
STEPS, PATIENCE, RATE = 4, 1, 1e-3


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.fixture(scope="module")
def recorded(tiny_folder: Path, image_paths: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = replay_config(
        tmp_path_factory.mktemp("rollback"),
        tiny_folder,
        rl={"steps": STEPS, "rollout_batch_size": 2, "train_batch_size": 2},
        checkpoint={"save_every": 1, "keep_last": 1},
        health={"policy": "rollback", "patience": PATIENCE, "rollback_factor": 0.25, "max_rollbacks": 1},
    )
    write_made_up_record(config, image_paths, image_token_id=load_hf_config(tiny_folder).image_token_id)
    return config


def collapsing(
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, float],
    *,
    after: int = 2,
    cured: bool = True,
    shown: tuple[str, ...] = (),
) -> None:
    """Steps after `after` show a cause, as long as the rate is what it was: training is real, the numbers are not,
    but for those `shown`."""
    train_step = rl.train_step

    def step(state: Any, *given: Any) -> dict[str, float]:
        metrics = train_step(state, *given)
        gone = state.step > after and (not cured or metrics["lr"] > 0.9 * RATE)
        return metrics | LEARNING | {name: metrics[name] for name in ("grad_norm", *shown)} | (changed if gone else {})

    monkeypatch.setattr(rl, "train_step", step)


def rows(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run.output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.run.output_dir / "hf" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(recorded: RunConfig, topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run with a rollback in the middle."""
    config = elsewhere(recorded, tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        collapsing(patch, CAUSES["unparsable"][0])
        assert rl.run(config, topology, None) is not None
    return config


def test_back_to_the_last_good_checkpoint_with_a_lower_rate(whole: RunConfig) -> None:
    (entry,) = json.loads((whole.run.output_dir / "checkpoints" / "rollbacks.json").read_text())
    assert (entry["step"], entry["began"], entry["to"], entry["done"]) == (3, 3, 1, True), "step 2's weights sampled 3"
    assert "100.0 % of the responses hold no answer" in entry["reason"]
    found = rows(whole)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [row["health/rollbacks"] for row in found] == [0, 1, 1, 1]
    assert [row["lr"] for row in found] == pytest.approx([RATE] + [RATE / 4] * 3)


def test_killed_at_any_moment_it_goes_on_as_it_would_have(
    whole: RunConfig, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the later checkpoints are removed, and after a step with the lower rate."""
    collapsing(monkeypatch, CAUSES["unparsable"][0])
    killed, train_step = elsewhere(whole, tmp_path), rl.train_step

    class KilledError(Exception):
        pass

    def die(*_: Any) -> Any:
        raise KilledError

    with monkeypatch.context() as context:
        context.setattr(rollback, "_complete", die)
        with pytest.raises(KilledError):
            rl.run(killed, topology, None)
    assert (tmp_path / "checkpoints" / "step-00000003").exists(), "nothing was removed yet"
    with monkeypatch.context() as context:
        context.setattr(rl, "train_step", lambda state, *rest: (die if state.step == 2 else train_step)(state, *rest))
        with pytest.raises(KilledError):
            rl.run(killed, topology, None)
    assert not (tmp_path / "checkpoints" / "step-00000003").exists()
    assert rl.run(killed, topology, None) is not None
    for name in ("loss", "grad_norm", "lr", "health/rollbacks"):
        assert [row[name] for row in rows(killed)] == [row[name] for row in rows(whole)], name
    mine, theirs = weights(killed), weights(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_what_comes_again_stops_the_run(
    recorded: RunConfig, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    collapsing(monkeypatch, CAUSES["entropy"][0], cured=False)
    twice = elsewhere(recorded, tmp_path, health={"max_rollbacks": 2})
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(SignalGoneError, match=r"entropy is .*rolled back 2 times .*and it came again"),
    ):
        rl.run(twice, topology, None)
    assert "going back to step 1, the learning rate is multiplied by 0.25 (rollback 2 of at most 2)" in caplog.text
    entries = json.loads((tmp_path / "checkpoints" / "rollbacks.json").read_text())
    assert [entry["to"] for entry in entries] == [1, 1]
    assert rows(twice)[-1]["lr"] == pytest.approx(RATE / 16), "both factors, from the checkpoint's own rate"


def test_without_a_good_checkpoint_it_stops_and_says_why(
    recorded: RunConfig, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collapsing(monkeypatch, CAUSES["same answer, 1"][0], after=0)
    with pytest.raises(SignalGoneError, match=r"no checkpoint of step -1 or earlier to go back to: lower"):
        rl.run(elsewhere(recorded, tmp_path), topology, None)


def test_an_entropy_that_the_rate_itself_destroys_recovers(
    recorded: RunConfig, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The entropy is the policy's own: at this rate it falls from 4.7 to 3 nats within two steps."""
    collapsing(monkeypatch, {}, shown=("entropy",))
    config = elsewhere(
        recorded, tmp_path, optimizer={"lr": 0.03}, health={"min_entropy": 3.6, "rollback_factor": 0.03}
    )  # fmt: skip
    assert rl.run(config, topology, None) is not None
    (entry,) = json.loads((tmp_path / "checkpoints" / "rollbacks.json").read_text())
    assert (entry["began"], entry["to"]) == (3, 1)
    assert "the policy's entropy is" in entry["reason"]
    assert min(row["entropy"] for row in rows(config)) > 3.6


def test_checkpoints_that_an_alarm_may_go_back_to_are_kept(tmp_path: Path) -> None:
    for step in range(1, 10):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        write_manifest(folder, {}, kind="training", run="a", step=step)
    newest = tmp_path / "step-00000009"
    gone = expired(tmp_path, CheckpointSection(keep_last=1), newest=newest, reach=3)
    assert [folder.name for folder in gone] == [f"step-{step:08d}" for step in range(1, 6)]
    assert len(expired(tmp_path, CheckpointSection(keep_last=1), newest=newest)) == 8


def test_a_critic_goes_back_with_its_policy(
    recorded: RunConfig, topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it expects before step 2 is the same again; then it learns at the lower rate, as the policy does."""
    config = elsewhere(recorded, tmp_path, algorithm={"advantage_estimator": "gae"}, critic={"lr": 4 * RATE})
    collapsing(monkeypatch, CAUSES["unparsable"][0], shown=("critic/value_mean", "critic/lr", "critic/loss"))
    train_step, seen = rl.train_step, []

    def step(state: Any, *given: Any) -> dict[str, float]:
        metrics = train_step(state, *given)
        seen.append((state.step, metrics["critic/value_mean"], metrics["critic/lr"]))
        return metrics

    monkeypatch.setattr(rl, "train_step", step)
    rl.run(config, topology, None)
    assert [number for number, _, _ in seen] == [1, 2, 3, 2, 3, 4]
    assert seen[1][1] == seen[3][1] != seen[0][1]
    assert [rate / RATE for _, _, rate in seen] == pytest.approx([4, 4, 4, 1, 1, 1])
