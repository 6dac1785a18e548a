"""Training state through megatron-core's distributed checkpoints, with a manifest written last.

Layout of `<run>/checkpoints`: `step-00000025/` (the shards, `state.json`, `manifest.json`) and `latest`, a file with
the name of the newest complete one. A checkpoint without a manifest that matches its files does not exist.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"
log = logging.getLogger(__name__)


def _metadata() -> dict[str, Any]:
    # megatron-core's default optimizer sharding cannot be saved in 0.16.1; this one loads under any layout.
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _sharded_state(model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    weights = model.sharded_state_dict(metadata=metadata)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata),
    }


def atomic_write(path: Path, text: str) -> None:
    """The file appears with its whole content or not at all."""
    staging = path.with_name(path.name + ".partial")
    with staging.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(staging, path)


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def save_checkpoint(
    root: Path, *, step: int, model: Any, optimizer: Any, scheduler: Any, state: Mapping[str, Any], keep_last: int
) -> Path:
    """Save after `step` finished steps; collective. `state` is JSON: counters, weight version, configuration.

    Older checkpoints beyond `keep_last` are removed only after the new one is complete.
    """
    folder = root / f"step-{step:08d}"
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    sharded = _sharded_state(model, optimizer, loading=False)
    sharded["scheduler"] = scheduler.state_dict()
    content = {key: value for key, value in _metadata().items() if key != "dp_cp_group"}
    dist_checkpointing.save(sharded, str(folder), content_metadata=content)
    if main:
        atomic_write(folder / STATE, json.dumps({"step": step, **state}, indent=2, default=str))
        files = {path.name: _hash(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
        atomic_write(folder / MANIFEST, json.dumps({"step": step, "sha256": files}, indent=2))
        atomic_write(root / LATEST, folder.name)
        for old in sorted(root.glob("step-????????"))[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return folder


def verify_checkpoint(folder: Path) -> str | None:
    """None when every file is as the manifest says, else the first thing that is wrong."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing: the save did not finish"
    except json.JSONDecodeError:
        return f"{MANIFEST} is not JSON"
    for name, expected in manifest["sha256"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _hash(path) != expected:
            return f"{name} does not match its hash"
    return None


def find_checkpoint(root: Path) -> Path | None:
    """The newest intact checkpoint under `root`; broken ones are named in the log and passed over."""
    for folder in sorted(root.glob("step-????????"), reverse=True):
        problem = verify_checkpoint(folder)
        if problem is None:
            return folder
        log.warning("checkpoint %s is not used: %s", folder, problem)
    return None


def load_checkpoint(folder: Path, *, model: Any, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Restore weights, moments and schedule from an intact folder; collective. Returns its `state`.

    Raises:
        ValueError: the folder fails verification.
    """
    problem = verify_checkpoint(folder)
    if problem is not None:
        raise ValueError(f"checkpoint {folder}: {problem}")
    sharded = _sharded_state(model, optimizer, loading=True)
    loaded = dist_checkpointing.load(sharded, str(folder))
    model.load_state_dict(loaded["model"], strict=False)  # not strict: *_extra_state of the other spec may be absent
    with torch.no_grad():  # megatron-core copies into fp32 main parameters, which are leaf views
        optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    return json.loads((folder / STATE).read_text())
