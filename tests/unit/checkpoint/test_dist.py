"""Training state: what is saved comes back, and a damaged checkpoint is never taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_r1reward.checkpoint.dist import LATEST, find_checkpoint, load_checkpoint, save_checkpoint
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.parallel import setup
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
def topology(config: RunConfig):
    yield setup.initialize(config.parallel, seed=0)
    setup.shutdown()


def train(state: TrainState, steps: int) -> list[float]:
    ids = tuple(state.tokenizer.encode("<|im_start|>user\nWhich digit?"))
    prompt = Prompt(id="a", preference_id="a", token_ids=ids, image_paths=(), label=1, swapped=False)
    sequence = state.packer.sequence(prompt, state.tokenizer.encode("The image shows 7."))
    return [float(train_micro_batches(state, [sequence], [[0]], cross_entropy)[0][0]["loss"]) for _ in range(steps)]


def save(state: TrainState, root: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(
        root,
        step=step,
        model=state.module,
        optimizer=state.optimizer,
        scheduler=state.scheduler,
        state={"note": "x"},
        keep_last=keep,
    )


def test_the_next_losses_after_a_resume_are_those_that_would_have_been(config, topology, tmp_path):
    state = build_state(config, topology, optimizer_steps=20)
    train(state, 3)
    folder = save(state, tmp_path, 3)
    expected = train(state, 3)
    fresh = build_state(config, topology, optimizer_steps=20)
    saved = load_checkpoint(folder, model=fresh.module, optimizer=fresh.optimizer, scheduler=fresh.scheduler)
    assert saved["step"] == 3
    assert saved["note"] == "x"
    assert train(fresh, 3) == pytest.approx(expected, abs=1e-6)
    assert expected[0] != expected[2]
    # The optimizer's moments, not only its effect on one loss.
    moments = [
        [
            s[key]
            for s in st.optimizer.chained_optimizers[0].optimizer.state.values()
            for key in ("exp_avg", "exp_avg_sq")
        ]
        if hasattr(st.optimizer, "chained_optimizers")
        else [s[key] for s in st.optimizer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        for st in (state, fresh)
    ]
    assert len(moments[0]) > 0
    for a, b in zip(*moments, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_damaged_checkpoints_are_passed_over_and_old_ones_removed_last(config, topology, tmp_path, caplog):
    state = build_state(config, topology, optimizer_steps=20)
    for step in (1, 2, 3):
        train(state, 1)
        save(state, tmp_path, step)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert (tmp_path / LATEST).read_text() == "step-00000003"
    newest = tmp_path / "step-00000003"
    shard = next(path for path in newest.iterdir() if path.suffix == ".distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert find_checkpoint(tmp_path) == tmp_path / "step-00000002"
    assert shard.name in caplog.text
    with pytest.raises(ValueError, match="does not match its hash"):
        load_checkpoint(newest, model=state.module, optimizer=state.optimizer, scheduler=state.scheduler)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    assert find_checkpoint(tmp_path) is None
