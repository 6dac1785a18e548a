"""The run directory: where a stage writes, and how it continues what is there."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_r1reward.checkpoint.dist import Trained, find_checkpoint_together, load_checkpoint
from megatron_r1reward.checkpoint.hf_model_io import save_hf_folder
from megatron_r1reward.config.load import dump_config
from megatron_r1reward.files import write_text
from megatron_r1reward.monitor.sinks import Monitor
from megatron_r1reward.training.data_parallel import synchronize_parameters
from megatron_r1reward.training.heartbeat import RunControl
from megatron_r1reward.training.state import TrainState

log = logging.getLogger(__name__)


def prepare(state: TrainState) -> Path:
    """Create the run directory with the resolved configuration; returns it."""
    root = state.config.run.output_dir
    if state.topology.is_main:
        root.mkdir(parents=True, exist_ok=True)
        dump_config(state.config, root / "config.toml")
    return root


def describe_data(ids: Iterable[str], *, seed: int, batch_size: int, order: str = "random") -> dict[str, object]:
    """What decides which rows a step trains on: the rows (after the selection of hard ones) and how they are drawn."""
    digest, count = hashlib.sha256(), 0
    for row in ids:
        digest.update(row.encode() + b"\0")
        count += 1
    return {"rows": count, "ids": digest.hexdigest(), "seed": seed, "batch_size": batch_size, "response_order": order}


def resume(state: TrainState) -> bool:
    """Continue from the newest intact checkpoint, when there is one; collective. `state.data` must be set.

    Raises:
        ValueError: there are checkpoints, but `checkpoint.resume` is false: a new run would mix with the old one; or
            the checkpoint was trained on other data and `checkpoint.same_data` is true.
    """
    root = state.saver.root
    if not state.config.checkpoint.resume:
        if any(root.glob("step-*")):
            raise ValueError(f"{root} holds checkpoints and checkpoint.resume is false: choose another run.output_dir")
        return False
    folder = find_checkpoint_together(root)
    if folder is None:
        return False
    saved = load_checkpoint(folder, _trained(state))
    state.step = int(saved["step"])
    state.producer = saved.get("producer")
    _check_data(state, saved["data"], folder)
    log.info("resumed from %s after step %d", folder, state.step)
    return True


def _trained(state: TrainState) -> Trained:
    return Trained(model=state.module, optimizer=state.optimizer, scheduler=state.scheduler)


def _check_data(state: TrainState, saved: dict[str, object], folder: Path) -> None:
    """Everything random is drawn from (seed, step): the cursor is the step, as long as the data are the same."""
    now = json.loads(json.dumps(state.data))
    keys = sorted(now | saved)
    changed = [f"{key}: {saved.get(key)} then, {now.get(key)} now" for key in keys if saved.get(key) != now.get(key)]
    if not changed:
        return
    text = f"{folder} was trained on other data or in another order ({'; '.join(changed)})"
    if state.config.checkpoint.same_data:
        raise ValueError(f"{text}: restore them, or set checkpoint.same_data=false to go on with the new ones")
    log.warning("%s; going on with the new ones from step %d", text, state.step)


def save(state: TrainState, *, score: float | None = None, producer: Mapping[str, Any] | None = None) -> float:
    """Checkpoint after `state.step` steps; returns the seconds that training waited.

    Args:
        score: held-out accuracy.
        producer: RL, on the main rank: `RolloutProducer.state`.
    """
    started = time.monotonic()
    synchronize_parameters(state.model)
    content = {
        "config": state.config.model_dump(mode="json"),
        "data": state.data,
        "weight_version": state.step,  # what the rollout servers call these weights
        "producer": producer,
    }
    state.saver.save(state.step, _trained(state), content, score=score)
    return time.monotonic() - started


def export(state: TrainState, out: Path) -> None:
    """Write the current weights as a Hugging Face folder; collective."""
    synchronize_parameters(state.model)
    exporter, write = state.exporter, state.topology.is_main
    save_hf_folder(out, exporter.metas, exporter.tensors(), template=state.config.model.path, write=write)


def leave(control: RunControl, monitor: Monitor | None) -> None:
    """The stage stops before its last step; everything is saved. The next start continues here."""
    if monitor is not None:
        monitor.close()
    control.stopped()
    log.info("saved and stopped on request")


def mark_done(state: TrainState, **result: object) -> None:
    """The last file of a finished stage."""
    if state.topology.is_main:
        done = json.dumps({"step": state.step, **result}, default=str)
        write_text(state.config.run.output_dir / "DONE", done, durable=True)
