"""Training state: what is saved comes back, and nothing damaged is ever taken or good ever lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_r1reward.checkpoint.dist import (
    LATEST,
    RUN_ID,
    CheckpointError,
    Trained,
    describe_problem,
    find_checkpoint,
    load_checkpoint,
)
from megatron_r1reward.checkpoint.saver import CheckpointSaver, expired
from megatron_r1reward.config.schema import CheckpointSection, RunConfig
from megatron_r1reward.conversion.convert import import_folder
from megatron_r1reward.demo.tiny_models import TINY_SPECS, write_tiny_checkpoint
from megatron_r1reward.parallel import setup
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.training.schedule import train_micro_batches
from megatron_r1reward.training.sft import cross_entropy
from megatron_r1reward.training.state import TrainState, build_state
from megatron_r1reward.types import Prompt


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"path": str(tiny_folder), "precision": "fp32"},
            "data": {"train": "unused"},
            "optimizer": {"lr": 1e-3},
        }
    )


@pytest.fixture(scope="module")
def topology(config: RunConfig) -> Iterator[Topology]:
    yield setup.initialize(config.parallel, seed=0)
    setup.shutdown()


def train(state: TrainState, steps: int) -> list[float]:
    ids = tuple(state.tokenizer.encode("<|im_start|>user\nWhich digit?"))
    prompt = Prompt(id="a", preference_id="a", token_ids=ids, image_paths=(), label=1, swapped=False)
    sequence = state.packer.sequence(prompt, state.tokenizer.encode("The image shows 7."))
    return [float(train_micro_batches(state, [sequence], [[0]], cross_entropy)[0][0]["loss"]) for _ in range(steps)]


def trained(state: TrainState) -> Trained:
    return Trained(model=state.module, optimizer=state.optimizer, scheduler=state.scheduler)


def moments(state: TrainState) -> list[torch.Tensor]:
    parts = getattr(state.optimizer, "chained_optimizers", [state.optimizer])
    values = [s for part in parts for s in part.optimizer.state.values()]
    return [s[key] for s in values for key in ("exp_avg", "exp_avg_sq")]


@pytest.mark.slow
def test_training_goes_on_as_if_nothing_had_happened_and_damage_is_named(
    config: RunConfig, topology: Topology, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = build_state(config, topology, optimizer_steps=20)
    saver = CheckpointSaver(tmp_path, CheckpointSection(async_save=True))
    saver.save(0, trained(state), {"note": "before the first step"})  # moments do not exist yet
    train(state, 3)
    saver.save(3, trained(state), {"note": "x"})
    drawn = torch.rand(3)
    expected = train(state, 3)  # changes the weights while they are being written
    saver.close()
    assert (tmp_path / LATEST).read_text() == "step-00000003"
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000003"

    fresh = build_state(config, topology, optimizer_steps=20)
    saved = load_checkpoint(tmp_path / "step-00000003", trained(fresh))
    assert (saved["step"], saved["note"]) == (3, "x")
    assert torch.equal(torch.rand(3), drawn)  # the generators too
    assert train(fresh, 3) == expected  # bit for bit
    assert expected[0] != expected[2]
    assert len(moments(state)) > 0
    for a, b in zip(moments(state), moments(fresh), strict=True):
        assert torch.equal(a, b)
    load_checkpoint(tmp_path / "step-00000000", trained(fresh))
    assert all(not moment.any() for moment in moments(fresh))

    damaged_checkpoints_are_passed_over(tmp_path, caplog)


def damaged_checkpoints_are_passed_over(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, newest = root / "step-00000000", root / "step-00000003"
    manifest = json.loads((newest / "manifest.json").read_text())
    shard, items = next((name, entry["items"]) for name, entry in manifest["files"].items() if "items" in entry)
    item = max(items, key=lambda item: item["length"])
    intact = (newest / shard).read_bytes()

    def problem(change: str) -> str:
        caplog.clear()
        assert find_checkpoint(root) == good, change
        assert "OLDER checkpoint" in caplog.text, change
        found = describe_problem(newest, run_id=(root / RUN_ID).read_text().strip())
        assert found is not None
        assert found in caplog.text
        return found

    flipped = bytearray(intact)
    flipped[item["offset"] + item["length"] // 2] ^= 1
    (newest / shard).write_bytes(flipped)
    assert item["name"] in problem("a flipped bit")
    (newest / shard).write_bytes(intact[:-100])
    assert "truncated" in problem("a truncated shard")
    (newest / shard).unlink()
    assert f"{shard} is missing" in problem("a missing rank file")
    (newest / shard).write_bytes(intact)

    text = (newest / "manifest.json").read_text()
    (newest / "manifest.json").write_text(text.replace(manifest["run"], "0" * 32))
    assert "another run" in problem("a manifest of another run")
    (newest / "manifest.json").write_text(text[: len(text) // 2])
    assert "damaged" in problem("a torn manifest")
    (newest / "manifest.json").unlink()
    assert "did not finish" in problem("no manifest")
    shutil.rmtree(newest)
    assert find_checkpoint(root) == good


@pytest.mark.slow
def test_a_full_disk_loses_nothing(
    config: RunConfig, topology: Topology, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = build_state(config, topology, optimizer_steps=20)
    saver = CheckpointSaver(tmp_path, CheckpointSection())
    saver.save(1, trained(state), {})
    train(state, 1)
    with pytest.MonkeyPatch.context() as patch:
        full = shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20)  # type: ignore[attr-defined]
        patch.setattr(shutil, "disk_usage", lambda _: full)
        saver.save(2, trained(state), {})
    assert "NOT saved" in caplog.text
    assert "step-00000001" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, RUN_ID, "step-00000001"]
    with pytest.raises(CheckpointError, match="disk"):
        saver.close()
    saver = CheckpointSaver(tmp_path, CheckpointSection())
    saver.save(2, trained(state), {})
    saver.close()
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000002"


def test_retention_keeps_the_last_the_best_and_every_kth(tmp_path: Path) -> None:
    scores = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: 0.1, 6: 0.2}
    for step, score in scores.items():
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": {}, "score": score}))
    (tmp_path / "step-00000000").mkdir()  # broken: evidence, never removed

    def gone(**section: int) -> list[int]:
        paths = expired(tmp_path, CheckpointSection(**section), newest=tmp_path / "step-00000006")
        return [int(path.name.removeprefix("step-")) for path in paths]

    assert gone(keep_last=2) == [1, 2, 3, 4]
    assert gone(keep_last=1, keep_every=3) == [1, 2, 4, 5]
    assert gone(keep_last=1, keep_best=1) == [1, 2, 3, 5]
    assert gone(keep_last=1, keep_best=2) == [1, 3, 5]


@pytest.mark.slow
def test_first_weights_of_another_model_are_one_line(config: RunConfig, topology: Topology, tmp_path: Path) -> None:
    """megatron-core's own message spreads over pages, and names no file."""
    spec = dataclasses.replace(TINY_SPECS["qwen2_5_vl"], intermediate_size=128)
    write_tiny_checkpoint(tmp_path / "hf", corpus=["Which digit is shown?"] * 4, spec=spec)
    import_folder(tmp_path / "hf", tmp_path / "megatron", progress=False)
    other = config.model_copy(update={"checkpoint": CheckpointSection(init_from=tmp_path / "megatron")})
    with pytest.raises(
        ValueError, match=r"checkpoint .*/megatron is not of the model in model.path \(.*\): take"
    ) as end:
        build_state(other, topology, optimizer_steps=1)
    assert "\n" not in str(end.value)
