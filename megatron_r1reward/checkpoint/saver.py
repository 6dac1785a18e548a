"""Saving training checkpoints of one run: in the background where asked, atomically, and keeping the right ones."""

from __future__ import annotations

import json
import logging
import os
import pickle
import queue
import shutil
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from megatron_r1reward.checkpoint.dist import (
    LATEST,
    RUN_ID,
    STATE,
    CheckpointError,
    Trained,
    collect_random_state,
    layout,
    random_state,
    sharded_state,
    sharding_metadata,
    step_of,
)
from megatron_r1reward.checkpoint.manifest import hash_range, read_manifest, write_manifest
from megatron_r1reward.checkpoint.streaming import WrittenItem
from megatron_r1reward.config.schema import CheckpointSection
from megatron_r1reward.files import publish_folder, write_text

log = logging.getLogger(__name__)
_MARGIN_BYTES = 1 << 20  # room for the parts that are no tensors


def expired(root: Path, section: CheckpointSection, *, newest: Path, reach: int = 0) -> list[Path]:
    """Complete checkpoints that no rule keeps, oldest first. `newest`, just completed, is never among them. With
    `reach`, those less than so many steps older are kept, and the one before: a rollback may go there.

    A folder without a readable manifest counts for no rule and is left alone: it is evidence, not a checkpoint.
    """
    scores: dict[Path, float | None] = {}
    for folder in sorted(root.glob("step-????????")):
        try:
            manifest = read_manifest(folder)
        except ValueError:
            continue
        scores[folder] = manifest.get("score")
    folders = list(scores)
    keep = {newest, *folders[-section.keep_last :]}
    if reach:
        limit = step_of(newest) - reach
        keep |= {folder for folder in folders if step_of(folder) > limit}
        keep.update([folder for folder in folders if step_of(folder) <= limit][-1:])
    if section.keep_every is not None:
        keep |= {folder for folder in folders if step_of(folder) % section.keep_every == 0}
    if section.keep_best:
        scored = [folder for folder in folders if scores[folder] is not None]
        # Of equal scores the later one, which has seen more data.
        keep |= set(sorted(scored, key=lambda folder: (scores[folder] or 0.0, folder.name))[-section.keep_best :])
    return [folder for folder in folders if folder not in keep]


class WriteResults:
    """How megatron-core's checkpoint writers, which are forked from the rank, report to it: in the place of the queue
    that megatron-core would make at the first save (`_get_write_results_queue`).

    That queue is held by a manager process, which imports torch before it can answer (some seconds, 270 MB per rank),
    is never ended, and outlives a rank that is killed. Forked writers need no more than an anonymous file that they
    inherit: what a writer has put is there when it has ended, and the file goes when its last process does.
    """

    def __init__(self) -> None:
        self._file: int | None = None
        self._read = 0  # bytes of it

    def start(self) -> None:
        """Before a save: what an earlier one that failed has left is not this one's."""
        if self._file is None:
            self._file = os.memfd_create("checkpoint-write-results")
        os.ftruncate(self._file, 0)
        self._read = 0
        filesystem_async._results_queue = self

    def put(self, result: Any) -> None:
        """In the writer, a fork of the rank."""
        content = pickle.dumps(result)
        assert self._file is not None, "writers are forked after start()"
        with os.fdopen(os.dup(self._file), "ab") as file:
            file.write(len(content).to_bytes(8, "little") + content)

    def get_nowait(self) -> Any:
        """In the rank, when the writer has ended: the first result that was not read yet.

        Raises:
            queue.Empty: there is none; the writer was killed.
        """
        assert self._file is not None, "there is no save"
        size = int.from_bytes(os.pread(self._file, 8, self._read), "little")
        content = os.pread(self._file, size, self._read + 8)
        if not size or len(content) < size:
            raise queue.Empty
        self._read += 8 + size
        return pickle.loads(content)

    def close(self) -> None:
        if self._file is not None:
            filesystem_async._results_queue = None
            os.close(self._file)
            self._file = None


@dataclass(kw_only=True)
class _Pending:
    """A save that is not complete: first the shards are written, then hashed."""

    step: int
    staging: Path
    score: float | None
    started: float
    hashing: Future[dict[str, list[WrittenItem]]] | None = None


class CheckpointSaver:
    """One per run and rank. All methods are collective over all ranks.

    A save that fails (a full disk) is reported in the log, removed, and counted in `failures`; training goes on from
    memory and the next save tries again. `close` raises when the last save failed. Nothing that was good before is
    removed until the new checkpoint is complete.
    """

    def __init__(self, root: Path, section: CheckpointSection, *, reach: int = 0) -> None:
        """`reach` as in `expired`."""
        self.root, self.section, self.reach = root, section, reach
        self.failures = 0
        self.last_error: str | None = None
        self._queue = AsyncCallsQueue()
        self._results = WriteResults()
        self._pending: _Pending | None = None
        self._hasher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-hash")
        self._main = dist.get_rank() == 0

    def save(self, step: int, trained: Trained, state: Mapping[str, Any], *, score: float | None = None) -> None:
        """Save after `step` finished steps. With `async_save` it returns when the state is copied; `poll` completes it.

        Args:
            state: JSON: configuration, data cursor, weight version.
            score: held-out accuracy at this step, by which `keep_best` chooses; only the main rank's counts.
        """
        self.poll(blocking=True)
        sharded = sharded_state(trained, loading=False)
        staging = self.root / f"step-{step:08d}.partial"
        error = self._prepare(staging, sharded)
        if error is not None:
            self._failed(step, staging, error)
            return
        sharded["random_state"] = random_state(collect_random_state())
        if self._main:
            content = {"step": step, "layout": layout(), **state}
            write_text(staging / STATE, json.dumps(content, indent=2, default=str), durable=True)
        self._results.start()
        request = dist_checkpointing.save(
            sharded,
            str(staging),
            async_sharded_save=True,
            content_metadata={k: v for k, v in sharding_metadata().items() if k != "dp_cp_group"},
        )
        self._queue.schedule_async_request(request)
        self._pending = _Pending(step=step, staging=staging, score=score, started=time.monotonic())
        if not self.section.async_save:
            self.poll(blocking=True)

    def poll(self, *, blocking: bool = False) -> None:
        """Complete the save in progress if its data is written (or wait for it). Cheap when there is none."""
        pending = self._pending
        if pending is None:
            return
        try:
            if pending.hashing is None:
                if not self._queue.maybe_finalize_async_calls(blocking=blocking):
                    return
                pending.hashing = self._hasher.submit(_hash_own_files, pending.staging, dist.get_rank())
            if not blocking and not _all_ranks(pending.hashing.done()):
                return
            self._complete(pending, pending.hashing.result())
        except (CheckpointException, OSError, RuntimeError) as error:
            self._pending = None
            self._failed(pending.step, pending.staging, f"{type(error).__name__}: {error}")

    def close(self) -> None:
        """Complete what is in progress.

        Raises:
            CheckpointError: the last save failed.
        """
        self.poll(blocking=True)
        self._hasher.shutdown()
        self._results.close()
        if self.last_error is not None:
            raise CheckpointError(f"the last checkpoint was not saved: {self.last_error}")

    def _prepare(self, staging: Path, sharded: dict[str, Any]) -> str | None:
        """Make the folder on the main rank; says why not when the disk cannot take the checkpoint."""
        needed = torch.tensor(_local_bytes(sharded), dtype=torch.int64, device=torch.cuda.current_device())
        dist.all_reduce(needed)
        answer: list[str | None] = [None]
        if self._main:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                if not (self.root / RUN_ID).exists():
                    write_text(self.root / RUN_ID, uuid.uuid4().hex + "\n", durable=True)
                for leftover in self.root.glob("step-????????.partial"):
                    shutil.rmtree(leftover)
                staging.mkdir()
                free = shutil.disk_usage(staging).free
                if int(needed) + _MARGIN_BYTES > free:
                    answer = [f"it needs {int(needed) / 1e9:.2f} GB, the disk of {self.root} has {free / 1e9:.2f} GB"]
            except OSError as error:
                answer = [str(error)]
        dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def _complete(self, pending: _Pending, own: dict[str, list[WrittenItem]]) -> None:
        """Manifest, name, pointer, retention, in this order; on the main rank."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        answer: list[str | None] = [None]
        if self._main:
            try:
                items = {name: written for part in everyone for name, written in part.items()}
                run = (self.root / RUN_ID).read_text().strip()
                write_manifest(pending.staging, items, kind="training", run=run, step=pending.step, score=pending.score)
                folder = self.root / pending.staging.name.removesuffix(".partial")
                publish_folder(pending.staging, folder)
                write_text(self.root / LATEST, folder.name, durable=True)
                for old in expired(self.root, self.section, newest=folder, reach=self.reach):
                    shutil.rmtree(old)
                log.info("saved %s in %.1f s", folder, time.monotonic() - pending.started)
            except OSError as error:
                answer = [str(error)]
        dist.broadcast_object_list(answer, src=0)
        if answer[0] is not None:
            raise OSError(answer[0])
        self._pending, self.last_error = None, None

    def _failed(self, step: int, staging: Path, reason: str) -> None:
        self.failures += 1
        self.last_error = f"step {step}: {reason}"
        if self._main:
            shutil.rmtree(staging, ignore_errors=True)
            last = (self.root / LATEST).read_text() if (self.root / LATEST).is_file() else "none"
            log.error("checkpoint of step %d was NOT saved (%s); the last good one is %s", step, reason, last)


def _all_ranks(done: bool) -> bool:
    flag = torch.tensor(int(done), device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _local_bytes(sharded: dict[str, Any]) -> int:
    """What this rank will write."""
    tensors = (t for t in nested_values(sharded) if isinstance(t, ShardedTensor | ShardedTensorFactory))
    return sum(t.data.nbytes for t in tensors if t.data is not None and is_main_replica(t.replica_id))


def _hash_own_files(folder: Path, rank: int) -> dict[str, list[WrittenItem]]:
    """Per tensor, for the files that this rank wrote; `.metadata` says where in them the tensors are."""
    places: dict[str, list[tuple[int, int, str]]] = {}
    for index, info in FileSystemReader(folder).read_metadata().storage_data.items():
        if info.relative_path.startswith(f"__{rank}_"):
            offset = "" if index.offset is None else str(list(index.offset))
            places.setdefault(info.relative_path, []).append((info.offset, info.length, index.fqn + offset))
    return {
        name: [
            WrittenItem(name=item, offset=offset, length=length, hash=hash_range(folder / name, offset, length))
            for offset, length, item in sorted(members)
        ]
        for name, members in places.items()
        if os.path.exists(folder / name)
    }
