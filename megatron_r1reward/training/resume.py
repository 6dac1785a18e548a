"""The run directory: where a stage writes, and how it continues what is there."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_r1reward.checkpoint.dist import LATEST, Trained, find_checkpoint_together, keep_identity, load_checkpoint
from megatron_r1reward.checkpoint.hf_model_io import save_hf_folder
from megatron_r1reward.config.load import dump_config
from megatron_r1reward.files import write_text
from megatron_r1reward.model_folder import prompt_policy
from megatron_r1reward.model_folder.config_reader import CONFIG
from megatron_r1reward.model_folder.scalar_folder import scalar_config
from megatron_r1reward.run_dir import RunDir
from megatron_r1reward.training import rollback
from megatron_r1reward.training.data_parallel import synchronize_parameters
from megatron_r1reward.training.heartbeat import RunControl
from megatron_r1reward.training.models_read import check_models_read
from megatron_r1reward.training.state import TrainState

log = logging.getLogger(__name__)
DESCRIBES_THE_BASE: dict[str, str | None] = {"README.md": None}  # `r1reward hub card` writes one about these weights


def prepare(state: TrainState) -> Path:
    """Create the run directory with the resolved configuration; returns it."""
    root = state.config.run.output_dir
    if state.topology.is_main:
        root.mkdir(parents=True, exist_ok=True)
        dump_config(state.config, root / "config.toml")
    return root


def describe_data(
    rows: Mapping[str, str], *, seed: int, batch_size: int, order: str = "random", stages: object = None
) -> dict[str, object]:
    """What decides which rows a step trains on: the rows (after the selection of hard ones) and how they are drawn.

    Args:
        rows: id -> `ContentKeys.row`, in the order of the data.
        stages: of a curriculum, `SelectedRows.description`.
    """
    return {
        "rows": len(rows),
        "ids": _digest(rows),
        "content": _digest(rows.values()),
        "seed": seed,
        "batch_size": batch_size,
        "response_order": order,
        "stages": stages,
    }


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def resume(state: TrainState) -> bool:
    """Continue from the newest intact checkpoint, when there is one; collective. `state.data` and `state.models` must
    be set.

    Raises:
        ValueError: there are checkpoints, but none can be used, or `checkpoint.resume` is false: a new run would mix
            with the old one; or the checkpoint was trained on other data and `checkpoint.same_data` is true; or with
            other models and `checkpoint.same_models` is true.
    """
    root = state.saver.root
    if not state.config.checkpoint.resume:
        if any(root.glob("step-*")) or (root / LATEST).exists():
            raise ValueError(f"{root} holds checkpoints and checkpoint.resume is false: choose another run.output_dir")
        return False
    return go_on(state)


def go_on(state: TrainState) -> bool:
    """`resume` of a run that is known to be this one; also in the middle of it, after a rollback."""
    root = state.saver.root
    rollbacks = rollback.history(root, state.topology)
    folder = find_checkpoint_together(root)
    if folder is None:
        run = RunDir(root=state.config.run.output_dir)
        if state.topology.is_main and run.metrics.exists():
            log.warning(
                "%s has metrics but no checkpoint: the earlier start ended before its first save; training begins at "
                "step 0, its metrics are kept as %s.previous",
                *(run.root, run.metrics.name),
            )
        return False
    if state.topology.is_main:
        keep_identity(root, folder)
    for part in parts_of(state):
        part.scheduler.num_steps = 0  # megatron-core adds the checkpoint's to them
        part.skipped_in_a_row = 0
    saved = load_checkpoint(folder, _trained(state))
    state.step = int(saved["step"])
    state.rollbacks = len(rollbacks)
    if rollbacks:
        for part in parts_of(state):
            rollback.lower_rate(part, rollbacks[saved.get("rollbacks", 0) :])
    state.producer = saved.get("producer")
    _check_data(state, saved["data"], folder)
    check_models_read(saved.get("models"), state.models, folder, same=state.config.checkpoint.same_models)
    log.info("resumed from %s after step %d", folder, state.step)
    return True


def parts_of(state: TrainState) -> tuple[TrainState, ...]:
    """What is trained: the policy (or the model of another stage), and the critic where there is one."""
    return (state,) if state.critic is None else (state, state.critic)


def _trained(state: TrainState) -> Trained:
    critic = None if state.critic is None else _trained(state.critic)
    return Trained(model=state.module, optimizer=state.optimizer, scheduler=state.scheduler, critic=critic)


def _check_data(state: TrainState, saved: dict[str, Any], folder: Path) -> None:
    """Everything random is drawn from (seed, step): the cursor is the step, as long as the data are the same."""
    now = json.loads(json.dumps(state.data))
    saved = {"stages": None, **saved}  # earlier versions knew none
    unknown = sorted(now.keys() - saved.keys())
    if unknown:
        log.warning(
            "%s is of an earlier version and does not say what it was trained with: %s; only the rest was compared",
            folder,
            ", ".join(_MEANING.get(key, key) for key in unknown),
        )
    changed = [_change(key, saved[key], now.get(key)) for key in sorted(saved) if saved[key] != now.get(key)]
    if not changed:
        return
    text = f"{folder} was trained on other data or in another order ({'; '.join(changed)})"
    if state.config.checkpoint.same_data:
        raise ValueError(f"{text}: restore them, or set checkpoint.same_data=false to go on with the new ones")
    log.warning("%s; going on with the new ones from step %d", text, state.step)
    if state.producer is not None and state.producer["ready"] is not None:
        log.warning("the batch that was sampled ahead is sampled again from the new ones")
        state.producer = {**state.producer, "ready": None}


_MEANING = {
    "ids": "the ids of the rows",
    "content": "what the rows say (texts, labels, images)",
    "stages": "data.curriculum, or the rows of its stages,",
}


def _change(key: str, then: object, now: object) -> str:
    """Digests are no news for anybody."""
    return f"{_MEANING[key]} changed" if key in _MEANING else f"{key}: {then} then, {now} now"


def save(state: TrainState, *, score: float | None = None, producer: Mapping[str, Any] | None = None) -> float:
    """Checkpoint after `state.step` steps; returns the seconds that training waited.

    Args:
        score: held-out accuracy.
        producer: RL, on the main rank: `RolloutProducer.state`.
    """
    started = time.monotonic()
    for part in parts_of(state):
        synchronize_parameters(part.model)
    critic = state.critic
    content = {
        "config": state.config.model_dump(mode="json"),
        "working_directory": str(Path.cwd()),  # what relative paths of the configuration are relative to
        "data": state.data,
        "models": state.models,
        "parts": state.parts,
        "rollbacks": state.rollbacks,
        "score_layers": state.score_layers,
        "critic": None if critic is None else {"path": str(critic.config.model.path), "layers": critic.score_layers},
        "weight_version": state.step,  # what the rollout servers call these weights
        "producer": producer,
        prompt_policy.FILE: _said(state),  # for `convert export`
    }
    state.saver.save(state.step, _trained(state), content, score=score)
    return time.monotonic() - started


def export(state: TrainState, out: Path) -> None:
    """Write the current weights as a Hugging Face folder; collective."""
    synchronize_parameters(state.model)
    exporter, write = state.exporter, state.topology.is_main
    said = {**DESCRIBES_THE_BASE, prompt_policy.FILE: _said(state)}
    folder = state.config.model.path
    if state.score_layers:
        said[CONFIG] = scalar_config((folder / CONFIG).read_text(encoding="utf-8"), state.score_layers)
    save_hf_folder(out, exporter.metas, exporter.tensors(), template=folder, write=write, texts=said)


def _said(state: TrainState) -> str | None:
    return None if state.described is None else state.described.to_json()


def leave(control: RunControl) -> None:
    """The stage stops before its last step; everything is saved. The next start continues here."""
    control.stopped()
    log.info("saved and stopped on request")


def mark_done(state: TrainState, **result: object) -> None:
    """The last file of a finished stage."""
    if state.topology.is_main:
        done = json.dumps({"step": state.step, **result}, default=str)
        write_text(RunDir(root=state.config.run.output_dir).done, done, durable=True)
