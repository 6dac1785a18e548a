"""The run directory: where a stage writes, and how it continues what is there."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from megatron_r1reward.checkpoint.dist import atomic_write, find_checkpoint, load_checkpoint, save_checkpoint
from megatron_r1reward.checkpoint.hf import export_hf_tensors, save_hf_folder
from megatron_r1reward.config.load import dump_config
from megatron_r1reward.training.data_parallel import synchronize_parameters
from megatron_r1reward.training.state import TrainState

log = logging.getLogger(__name__)


def prepare(state: TrainState) -> Path:
    """Create the run directory with the resolved configuration; returns it."""
    root = state.config.run.output_dir
    if state.topology.is_main:
        root.mkdir(parents=True, exist_ok=True)
        dump_config(state.config, root / "config.toml")
    return root


def resume(state: TrainState) -> bool:
    """Continue from the newest intact checkpoint, when there is one.

    Raises:
        ValueError: there are checkpoints, but `checkpoint.resume` is false: a new run would mix with the old one.
    """
    root = state.config.run.output_dir / "checkpoints"
    if not state.config.checkpoint.resume:
        if any(root.glob("step-*")):
            raise ValueError(f"{root} holds checkpoints and checkpoint.resume is false: choose another run.output_dir")
        return False
    folder = find_checkpoint(root)
    if folder is None:
        return False
    saved = load_checkpoint(folder, model=state.module, optimizer=state.optimizer, scheduler=state.scheduler)
    state.step = int(saved["step"])
    log.info("resumed from %s after step %d", folder, state.step)
    return True


def save(state: TrainState) -> float:
    """Checkpoint after `state.step` steps; returns the seconds it took."""
    started = time.monotonic()
    synchronize_parameters(state.model)
    save_checkpoint(
        state.config.run.output_dir / "checkpoints",
        step=state.step,
        model=state.module,
        optimizer=state.optimizer,
        scheduler=state.scheduler,
        state={"config": state.config.model_dump(mode="json")},
        keep_last=state.config.checkpoint.keep_last,
    )
    return time.monotonic() - started


def export(state: TrainState, out: Path) -> None:
    """Write the current weights as a Hugging Face folder; collective."""
    synchronize_parameters(state.model)
    tensors = export_hf_tensors(state.module, state.table, state.topology)
    save_hf_folder(out, tensors, template=state.config.model.path, write=state.topology.is_main)


def mark_done(state: TrainState, **result: object) -> None:
    """The last file of a finished stage."""
    if state.topology.is_main:
        atomic_write(state.config.run.output_dir / "DONE", json.dumps({"step": state.step, **result}, default=str))
