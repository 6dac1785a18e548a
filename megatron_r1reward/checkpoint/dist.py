"""Training state through megatron-core's distributed checkpoints.

Layout of `<run>/checkpoints`: `step-00000025/` (the shards, `state.json`, `manifest.json`), `run_id`, and `latest`, a
file with the name of the newest complete checkpoint. A save works in `step-00000025.partial`, writes the manifest last
and renames: a checkpoint without a manifest that matches its files does not exist.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_r1reward.checkpoint.manifest import find_damage, read_manifest
from megatron_r1reward.files import read_json, write_text

STATE = "state.json"
LATEST = "latest"
RUN_ID = "run_id"
CRITIC = "critic."  # prefix of a critic's tensors
_OPTIONAL = ("optimizer", "random_state", CRITIC)  # not asked for where only weights are loaded, or by another layout
log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. What was good before is still there."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a checkpoint holds of one rank: the model (or its chunks), the optimizer and the schedule; and those of a
    critic, where one is trained beside it."""

    model: Any
    optimizer: Any
    scheduler: Any
    critic: Trained | None = None


def sharding_metadata() -> dict[str, Any]:
    # megatron-core's default optimizer sharding cannot be saved in 0.16.1; this one loads under any layout.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def sharded_state(trained: Trained, *, loading: bool) -> dict[str, Any]:
    metadata = sharding_metadata()
    weights = trained.model.sharded_state_dict(metadata=metadata)
    if not loading:
        _ensure_moments(trained.optimizer)
    sharded: dict[str, Any] = {
        "model": weights,
        "optimizer": trained.optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata),
    }
    if not loading:
        sharded["scheduler"] = trained.scheduler.state_dict()
    if trained.critic is not None:
        sharded["critic"] = sharded_state(trained.critic, loading=loading)
        add_prefix_for_sharding(sharded["critic"], CRITIC)
    return sharded


def _ensure_moments(optimizer: Any) -> None:
    """Before the first step an Adam has no moments yet; megatron-core can save them only when they exist (as zeros)."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None or any(inner.state.values()):
            continue
        part.init_state_fn(inner, part.config)
        for group in inner.param_groups:
            group.setdefault("step", 0)


def layout() -> dict[str, int]:
    """The parallel sizes under which ranks have the same places, e.g. the same random states."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "world": dist.get_world_size(),
    }


def random_state(data: Any = None) -> ShardedObject:
    """This rank's generators. Every rank has its own: they are restored under the same layout only."""
    return ShardedObject("random_state", data, (dist.get_world_size(),), (dist.get_rank(),), replica_id=0)


def collect_random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": _cuda_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }


def _cuda_state() -> torch.Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    saved_on, here = ("a CPU" if cuda is None else "a GPU" for cuda in (state["cuda"], _cuda_state()))
    if saved_on == here:
        if state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"])
        tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    else:
        log.warning("saved on %s, resumed on %s: the device's random states are not restored", saved_on, here)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def describe_problem(folder: Path, *, run_id: str | None = None, hashes: bool = True) -> str | None:
    """None when the checkpoint is intact and of this run, else the first thing that is wrong.

    Args:
        run_id: of the run that asks; a checkpoint of another run is a problem. None: any run's will do.
    """
    damage = next(iter(find_damage(folder, hashes=hashes)), None)
    if damage is not None:
        return damage
    manifest = read_manifest(folder)
    if manifest["kind"] != "training":
        return "it holds weights only, no training state"
    if run_id is not None and manifest["run"] != run_id:
        return f"its manifest is of another run ({manifest['run']}, this is {run_id})"
    state = read_json(folder / STATE)
    if not folder.name == f"step-{state['step']:08d}" == f"step-{manifest['step']:08d}":
        return (
            f"its folder, state and manifest name different steps ({folder.name}, {state['step']}, {manifest['step']})"
        )
    return None


def find_checkpoint(root: Path) -> Path | None:
    """The newest intact checkpoint under `root`; broken ones are named in the log and passed over. None: there has
    never been a complete one.

    Raises:
        ValueError: there are checkpoints, or there were, and none can be used; or intact ones are of several runs and
            nothing says which one this is. Starting again at step 0 is the user's decision.
    """
    for leftover in sorted(root.glob("step-????????.partial")):
        log.warning("%s is what an interrupted save left; it is not used", leftover)
    run_id = _run_of(root)
    folders = sorted(root.glob("step-????????"), reverse=True)
    for broken, folder in enumerate(folders):
        problem = describe_problem(folder, run_id=run_id)
        if problem is None:
            if broken:
                log.warning("going on from %s, an OLDER checkpoint, because %d newer ones are broken", folder, broken)
            return folder
        log.error("checkpoint %s is not used: %s", folder, problem)
    start_over = f"restore one, or start over with another run.output_dir or without {root}"
    if folders:
        raise ValueError(f"{root}: none of its {len(folders)} checkpoints can be used, the log says why: {start_over}")
    if (root / LATEST).is_file():
        gone = (root / LATEST).read_text().strip()
        raise ValueError(f"{root / LATEST} names {gone}, but there is no checkpoint any more: {start_over}")
    return None


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(folder.name.removeprefix("step-"))


def _run_of(root: Path) -> str | None:
    """The run that the checkpoints of a folder belong to. Where only step folders were copied it is theirs."""
    if (root / RUN_ID).is_file():
        return (root / RUN_ID).read_text().strip()
    runs: dict[str, str] = {}
    for folder in sorted(root.glob("step-????????")):
        with suppress(ValueError):  # damaged: no witness
            runs[str(read_manifest(folder).get("run"))] = folder.name
    if len(runs) > 1:
        raise ValueError(
            f"{root} holds checkpoints of {len(runs)} runs (e.g. {', '.join(sorted(runs.values()))}) and no {RUN_ID}: "
            "keep those of one run"
        )
    return next(iter(runs), None)


def keep_identity(root: Path, folder: Path) -> None:
    """Go on as the run that `folder` is of, so that the next start knows its checkpoints, too."""
    if not (root / RUN_ID).is_file():
        write_text(root / RUN_ID, f"{read_manifest(folder)['run']}\n", durable=True)


def find_checkpoint_together(root: Path) -> Path | None:
    """`find_checkpoint` on the main rank, the answer on all: the files are hashed once, not once per rank."""
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            answer = [find_checkpoint(root)]
        except (OSError, ValueError) as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


def load_checkpoint(folder: Path, trained: Trained) -> dict[str, Any]:
    """Restore weights, moments, schedule and random states from a folder that `find_checkpoint` returned; collective.

    Any layout reads what any other wrote. Returns the checkpoint's `state`. A critic that nobody asks for is left out.

    Raises:
        ValueError: the folder is incomplete or has another model's tensors, or no critic where there is one to restore.
    """
    problem = describe_problem(folder, hashes=False)
    if problem is not None:
        raise ValueError(f"checkpoint {folder}: {problem}")
    state: dict[str, Any] = read_json(folder / STATE)
    if trained.critic is not None and not state.get("critic"):
        raise ValueError(
            f"checkpoint {folder} was saved by a run without a critic: start another run.output_dir from its weights "
            "(model.path: what `r1reward convert export` makes of them)"
        )
    if trained.critic is None and state.get("critic"):
        log.warning("%s holds a critic, and this run has none: its critic is left behind", folder)
    sharded = sharded_state(trained, loading=True)
    if state["layout"] == layout():
        sharded["random_state"] = random_state()
    else:
        log.info("layout %s instead of %s: random states are not restored", layout(), state["layout"])
    loaded = _load(sharded, folder)
    _restore(trained, loaded)
    if trained.critic is not None:
        _restore(trained.critic, loaded["critic"])
    if "random_state" in sharded:
        _restore_random_state(loaded["random_state"])
    return state


def _restore(trained: Trained, loaded: Mapping[str, Any]) -> None:
    # Not strict: *_extra_state of another layer implementation may be absent.
    trained.model.load_state_dict(loaded["model"], strict=False)
    with torch.no_grad():  # megatron-core copies into fp32 main parameters, which are leaf views
        trained.optimizer.load_state_dict(loaded["optimizer"])
    trained.scheduler.load_state_dict(loaded["scheduler"])


def load_weights(folder: Path, model: Any) -> None:
    """Only the weights, from an imported or a training checkpoint; collective.

    Raises:
        ValueError: the folder is damaged or has another model's tensors.
    """
    answer = [next(iter(find_damage(folder)), None) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is not None:
        raise ValueError(f"checkpoint {folder}: {answer[0]}")
    weights = _load({"model": model.sharded_state_dict(metadata=sharding_metadata())}, folder)["model"]
    model.load_state_dict(weights, strict=False)


def _load(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    # megatron-core calls "missing" what nobody asked for, and "unexpected" what was asked for and is not there.
    try:
        loaded, unused, absent = dist_checkpointing.load(sharded, str(folder), strict=StrictHandling.RETURN_ALL)
    except (CheckpointException, CheckpointingException) as error:  # e.g. tensors of other shapes
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        refused = next((cause for cause in causes if isinstance(cause, CheckpointingException)), None)
        if refused is None:  # it cannot be read
            raise
        raise ValueError(
            f"checkpoint {folder} is not of the model in model.path ({str(refused).splitlines()[0]}): take both from "
            "one model"
        ) from None
    absent = {key for key in absent if "_extra_state" not in key}
    unused = {key for key in unused if not key.startswith(_OPTIONAL) and "_extra_state" not in key}
    for keys, what in ((absent, "lacks {} tensors of this model"), (unused, "has {} tensors that this model has not")):
        if keys:
            raise ValueError(f"checkpoint {folder} {what.format(len(keys))}, e.g. {', '.join(sorted(keys)[:3])}")
    result: dict[str, Any] = loaded
    return result
