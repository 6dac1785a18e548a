"""Hugging Face checkpoint folders: read into a Megatron model, written from one. One tensor at a time."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_r1reward.models.mapping import Entry, WeightTable, global_name
from megatron_r1reward.parallel.chunks import chunks_of
from megatron_r1reward.parallel.setup import Topology

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Name, dtype and full shape of one Hugging Face tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class HfReader:
    """Lazy access to the tensors of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not a Hugging Face checkpoint: config.json is missing")
        index = folder / _INDEX
        if index.is_file():
            self.files = {k: folder / v for k, v in json.loads(index.read_text())["weight_map"].items()}
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", framework="pt") as single:
                self.files = dict.fromkeys(single.keys(), folder / "model.safetensors")
        else:
            raise ValueError(f"{folder} holds no model.safetensors and no {_INDEX}: convert the weights to safetensors")
        self.folder = folder

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.files:
            raise ValueError(f"{self.folder} has no tensor {name!r}: is it a checkpoint of this model family?")
        with safe_open(self.files[name], framework="pt") as opened:
            return opened.get_tensor(name)


def tensor_parallel_place(entry: Entry) -> tuple[int, int]:
    """(size, rank) of the tensor parallelism of a parameter: experts may have one of their own."""
    if entry.expert is None:
        return (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
    return (
        parallel_state.get_expert_tensor_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )


@torch.no_grad()
def load_hf_weights(model: torch.nn.Module, folder: Path, table: WeightTable) -> None:
    """Copy every parameter of this rank's stage from `folder`.

    Raises:
        ValueError: a tensor is missing or a parameter has no entry in the table.
    """
    reader = HfReader(folder)
    for name, parameter in model.named_parameters():
        entry = table.by_megatron.get(global_name(model, name))
        if entry is None:
            raise ValueError(f"parameter {name!r} has no entry in the weight table")
        full = entry.layout.merge(tuple(entry.hf_part(reader[part]) for part in entry.hf))
        size, rank = tensor_parallel_place(entry)
        shard = entry.layout.shard(full, size, rank)
        if shard.shape != parameter.shape:
            raise ValueError(f"{entry.hf}: {tuple(shard.shape)} does not fit {name} {tuple(parameter.shape)}")
        parameter.copy_(shard)


class _Owners:
    """Which ranks hold a parameter: pipeline stages, and within one the ranks of the expert-parallel group."""

    def __init__(self, names: set[str]) -> None:
        self.experts = parallel_state.get_expert_model_parallel_group()
        self.stages = parallel_state.get_pipeline_model_parallel_group()
        self._by_expert_rank = _gather_objects(names, self.experts)
        self._by_stage = _gather_objects(set.union(*self._by_expert_rank), self.stages)

    def stage(self, name: str) -> int:
        return next(rank for rank, names in enumerate(self._by_stage) if name in names)

    def expert_rank(self, name: str) -> int:
        """Asked on the stage that holds the parameter."""
        return next(rank for rank, names in enumerate(self._by_expert_rank) if name in names)


def _gather_objects(value: set[str], group: dist.ProcessGroup) -> list[set[str]]:
    gathered: list[set[str]] = [value] * group.size()
    if group.size() > 1:
        dist.all_gather_object(gathered, value, group=group)
    return gathered


def _gather_tensor_parallel(entry: Entry, local: torch.Tensor) -> torch.Tensor:
    is_expert = entry.expert is not None
    group = (
        parallel_state.get_expert_tensor_parallel_group()
        if is_expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    if group.size() == 1:
        return local
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local.contiguous(), group=group)
    return entry.layout.unshard(shards)


def _gather(entry: Entry, local: torch.Tensor | None, owners: _Owners, topology: Topology) -> torch.Tensor:
    """The full Megatron tensor of one entry on every rank."""
    stage, full = owners.stage(entry.megatron), None
    if stage == topology.pipeline_parallel_rank:
        full = _gather_tensor_parallel(entry, local) if local is not None else None
        if entry.expert is not None and owners.experts.size() > 1:
            full = _broadcast(full, owners.expert_rank(entry.megatron), topology, owners.experts)
    if topology.pipeline_parallel_size > 1:
        full = _broadcast(full, stage, topology, owners.stages)
    assert full is not None
    return full


@torch.no_grad()
def export_hf_tensors(
    model: torch.nn.Module, table: WeightTable, topology: Topology
) -> Iterator[tuple[str, torch.Tensor]]:
    """Full tensors under their Hugging Face names, in table order, on every rank; collective over the model's ranks.

    One Hugging Face tensor is gathered at a time: the experts of a layer together where they are stacked on disk.
    """
    local = {
        global_name(chunk, name): parameter.detach()
        for chunk in chunks_of(model)
        for name, parameter in chunk.named_parameters()
    }
    owners = _Owners(set(local))
    for _, group in itertools.groupby(table, key=lambda entry: entry.hf):
        entries = list(group)
        parts = [e.layout.split(_gather(e, local.get(e.megatron), owners, topology)) for e in entries]
        full = [torch.stack(p) for p in zip(*parts, strict=True)] if entries[0].stacked else parts[0]
        yield from zip(entries[0].hf, full, strict=True)


def _broadcast(full: torch.Tensor | None, rank: int, topology: Topology, group: dist.ProcessGroup) -> torch.Tensor:
    source = dist.get_global_rank(group, rank)
    header = [(full.shape, full.dtype) if full is not None else None]
    dist.broadcast_object_list(header, src=source, group=group)
    assert header[0] is not None
    shape, dtype = header[0]
    tensor = full.contiguous() if full is not None else torch.empty(shape, dtype=dtype, device=topology.device)
    dist.broadcast(tensor, src=source, group=group)
    return tensor


def tensor_infos(folder: Path, table: WeightTable, dtype: torch.dtype) -> list[TensorInfo]:
    """What `export_hf_tensors` will yield, from the headers of the original folder: nothing is read or gathered."""
    reader = HfReader(folder)
    infos = []
    for name in table.hf_names:
        with safe_open(reader.files[name], framework="pt") as opened:
            infos.append(TensorInfo(name=name, dtype=dtype, shape=tuple(opened.get_slice(name).get_shape())))
    return infos


def save_hf_folder(
    out: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, template: Path, write: bool, shard_bytes: int = 5 << 30
) -> None:
    """Write a checkpoint folder with `template`'s config, tokenizer and processor files.

    Every rank has to consume `tensors` (it is collective); only the one with `write` touches the disk. The folder
    appears under its name only when it is complete.
    """
    staging = out.with_name(out.name + ".partial")
    if write:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            shards.append(sorted(pending))
            save_file(pending, staging / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
            pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        if not write:
            continue
        size = tensor.numel() * tensor.element_size()
        if pending_bytes + size > shard_bytes:
            flush()
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += size
        total_bytes += size
    if not write:
        return
    flush()
    _name_shards(staging, shards, total_bytes)
    for name in SIDE_FILES:
        if (template / name).is_file():
            shutil.copyfile(template / name, staging / name)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(staging, out)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Rename to the customary file names and write the index when there is more than one shard."""
    if len(shards) == 1:
        os.replace(folder / "shard-1.safetensors", folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{number}.safetensors", folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
