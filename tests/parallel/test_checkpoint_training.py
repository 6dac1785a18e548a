"""Training state across layouts, and what a kill or a full disk leaves behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from waiting import wait_until

from megatron_r1reward.checkpoint import saver as saver_module
from megatron_r1reward.checkpoint.dist import (
    LATEST,
    CheckpointError,
    Trained,
    describe_problem,
    find_checkpoint,
    find_checkpoint_together,
    load_checkpoint,
)
from megatron_r1reward.checkpoint.saver import CheckpointSaver
from megatron_r1reward.checkpoint.streaming import Sources
from megatron_r1reward.config.schema import CheckpointSection, RunConfig
from megatron_r1reward.conversion.torch_dist_folder import TorchDistFolder
from megatron_r1reward.model_folder.weight_table import CheckpointKey
from megatron_r1reward.parallel import setup
from megatron_r1reward.training.schedule import reduce_statistics, train_micro_batches
from megatron_r1reward.training.sft import cross_entropy
from megatron_r1reward.training.state import TrainState, build_state
from megatron_r1reward.types import Prompt

pytestmark = pytest.mark.parallel


def build(folder: Path, parallel: dict[str, Any]) -> TrainState:
    config = RunConfig.model_validate(
        {
            "run": {"output_dir": "unused"},
            "model": {"path": str(folder), "precision": "fp32"},
            "data": {"train": "unused", "token_budget": 400},
            "optimizer": {"lr": 1e-3, "warmup_fraction": 0.3},
            "parallel": parallel,
        }
    )
    return build_state(config, setup.initialize(config.parallel, seed=0), optimizer_steps=20)


def train(state: TrainState, image: str, steps: int) -> list[float]:
    """Mean losses of `steps` steps on four sequences, one with an image."""
    sequences = []
    for number in range(4):
        paths = (image,) if number == 0 else ()
        text = "<|im_start|>user\n" + "<|vision_start|><|image_pad|><|vision_end|>" * len(paths) + "Which digit?"
        prompt = Prompt(
            id=str(number),
            preference_id=str(number),
            token_ids=tuple(state.tokenizer.encode(text)),
            image_paths=paths,
            label=1,
            swapped=False,
        )
        sequences.append(state.packer.sequence(prompt, state.tokenizer.encode(f"The image shows {number}.")))
    mine = list(range(state.topology.data_parallel_rank, 4, state.topology.data_parallel_size))
    losses = []
    for _ in range(steps):
        statistics, _ = train_micro_batches(state, sequences, state.packer.plan(sequences, mine), cross_entropy)
        total = reduce_statistics(state, statistics)
        losses.append(total["loss"] / total["tokens"])
    return losses


def trained(state: TrainState) -> Trained:
    return Trained(model=state.module, optimizer=state.optimizer, scheduler=state.scheduler)


def start_and_save(root: Path, folder: Path, image: str, parallel: dict[str, Any]) -> list[float]:
    state = build(folder, parallel)
    train(state, image, 2)
    saver = CheckpointSaver(root, CheckpointSection(async_save=True))
    saver.save(2, trained(state), {"data": {}})
    losses = train(state, image, 2)
    saver.close()
    return losses


def resume_and_save_again(root: Path, again: Path, folder: Path, image: str, parallel: dict[str, Any]) -> list[float]:
    state = build(folder, parallel)
    checkpoint = find_checkpoint_together(root)
    assert checkpoint is not None
    saved = load_checkpoint(checkpoint, trained(state))
    assert saved["step"] == 2
    saver = CheckpointSaver(again, CheckpointSection())
    saver.save(2, trained(state), {"data": {}})
    saver.close()
    return train(state, image, 2)


def content(folder: Path) -> dict[str, torch.Tensor]:
    """Every global tensor of a checkpoint, weights and moments, whatever ranks wrote it."""
    dist = TorchDistFolder(folder, Sources())
    return {key: dist.parameter(CheckpointKey(key=key, index=())).clone() for key in dist.tensors}


def test_another_layout_goes_on_with_the_same_weights_and_moments(
    tiny_folder: Path, image_paths: tuple[str, ...], tmp_path: Path
) -> None:
    tp2 = {"tensor_model_parallel_size": 2}
    arguments = (tiny_folder, image_paths[0])
    expected = run_ranks(start_and_save, 2, tmp_path / "tp2", *arguments, tp2)[0]
    original = content(tmp_path / "tp2" / "step-00000002")
    moments = [key for key in original if "exp_avg" in key]
    assert moments
    assert any(original[key].any() for key in moments)
    layouts: dict[str, dict[str, Any]] = {"tp2": tp2, "pp2": {"pipeline_model_parallel_size": 2}, "dp2": {}}
    for name, parallel in layouts.items():
        again = tmp_path / f"again-{name}"
        losses = run_ranks(resume_and_save_again, 2, tmp_path / "tp2", again, *arguments, parallel)[0]
        assert losses == pytest.approx(expected, abs=0 if name == "tp2" else 1e-6), name
        copied = content(again / "step-00000002")
        assert set(copied) == set(original), name
        for key, tensor in original.items():
            assert torch.equal(copied[key], tensor), (name, key)


def save_forever(root: str, folder: Path, image: str) -> None:
    """In a process group of its own, so that a kill takes the background writers along."""
    os.setsid()
    torch.set_num_threads(1)
    state = build(folder, {})
    saver = CheckpointSaver(Path(root), CheckpointSection(async_save=True, keep_last=2))
    step = 0
    while True:
        train(state, image, 1)
        step += 1
        saver.save(step, trained(state), {"data": {}})


def go_on(root: str, folder: Path, image: str) -> int:
    state = build(folder, {})
    checkpoint = find_checkpoint(Path(root))
    assert checkpoint is not None
    step = int(load_checkpoint(checkpoint, trained(state))["step"])
    train(state, image, 1)
    saver = CheckpointSaver(Path(root), CheckpointSection())
    saver.save(step + 1, trained(state), {"data": {}})
    saver.close()
    return step


def named_latest(root: Path) -> str | None:
    return (root / LATEST).read_text() if (root / LATEST).is_file() else None


def test_a_kill_at_a_random_moment_leaves_a_checkpoint_to_go_on_from(
    tiny_folder: Path, image_paths: tuple[str, ...], tmp_path: Path
) -> None:
    delays = random.Random(os.getpid())
    for attempt in range(2):
        process = get_context("fork").Process(target=save_forever, args=(str(tmp_path), tiny_folder, image_paths[0]))
        process.start()
        assert process.pid is not None
        before = named_latest(tmp_path)
        assert (before is not None) == bool(attempt)
        try:
            wait_until(lambda: named_latest(tmp_path) != before or not process.is_alive(), 400)  # noqa: B023
            assert process.is_alive()
            time.sleep(delays.uniform(0.0, 3.0))
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        latest = tmp_path / (tmp_path / LATEST).read_text()
        assert describe_problem(latest) is None  # what `latest` names is always whole
        step = run_ranks(go_on, 1, str(tmp_path), tiny_folder, image_paths[0])[0]
        assert (tmp_path / LATEST).read_text() == f"step-{step + 1:08d}"
        assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tiny model, but not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {mounted.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(root: Path, folder: Path, image: str, check_first: bool) -> tuple[str | None, int, float]:
    """Save until the disk is full; with `check_first` off the writers run into the end of the disk themselves."""
    if not check_first:
        saver_module._MARGIN_BYTES = -(1 << 40)
    state = build(folder, {"tensor_model_parallel_size": 2})
    train(state, image, 1)
    saver = CheckpointSaver(root, CheckpointSection(keep_last=9))
    saver.save(1, trained(state), {"data": {}})
    saver.save(2, trained(state), {"data": {}})
    loss = train(state, image, 1)[0]  # training goes on
    try:
        saver.close()
    except CheckpointError as error:
        return str(error), saver.failures, loss
    return None, saver.failures, loss


@pytest.mark.parametrize("check_first", [True, False])
def test_a_full_disk_costs_only_the_checkpoint_that_did_not_fit(
    check_first: bool, small_disk: Path, tiny_folder: Path, image_paths: tuple[str, ...]
) -> None:
    root = small_disk / "checkpoints"
    for error, failures, loss in run_ranks(fill, 2, root, tiny_folder, image_paths[0], check_first):
        assert (failures, loss > 0) == (1, True)
        assert error is not None
        assert "step 2" in error
    assert sorted(path.name for path in root.iterdir()) == ["latest", "run_id", "step-00000001"]
    assert find_checkpoint(root) == root / "step-00000001"
