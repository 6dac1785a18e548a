"""Hugging Face checkpoint folders: read into a Megatron model, written from one. One tensor at a time."""

from __future__ import annotations

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

from megatron_r1reward.models.mapping import Entry, global_name
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


@torch.no_grad()
def load_hf_weights(model: torch.nn.Module, folder: Path, table: list[Entry], topology: Topology) -> None:
    """Copy every parameter of this rank's stage from `folder`.

    Raises:
        ValueError: a tensor is missing or a parameter has no entry in the table.
    """
    reader = HfReader(folder)
    by_name = {entry.megatron: entry for entry in table}
    tied_head = by_name["language_model.embedding.word_embeddings.weight"]
    by_name.setdefault("language_model.output_layer.weight", tied_head)  # the last stage's copy of tied embeddings
    for name, parameter in model.named_parameters():
        entry = by_name.get(global_name(model, name))
        if entry is None:
            raise ValueError(f"parameter {name!r} has no entry in the weight table")
        full = entry.layout.merge(tuple(reader[part] for part in entry.hf))
        shard = entry.layout.shard(full, topology.tensor_parallel_size, topology.tensor_parallel_rank)
        if shard.shape != parameter.shape:
            raise ValueError(f"{entry.hf}: {tuple(shard.shape)} does not fit {name} {tuple(parameter.shape)}")
        parameter.copy_(shard)


def _gather_tensor_parallel(entry: Entry, local: torch.Tensor, topology: Topology) -> torch.Tensor:
    if topology.tensor_parallel_size == 1:
        return local
    shards = [torch.empty_like(local) for _ in range(topology.tensor_parallel_size)]
    dist.all_gather(shards, local.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return entry.layout.unshard(shards)


@torch.no_grad()
def export_hf_tensors(
    model: torch.nn.Module, table: list[Entry], topology: Topology
) -> Iterator[tuple[str, torch.Tensor]]:
    """Full tensors under their Hugging Face names, in table order, on every rank; collective over the model's ranks.

    One Megatron tensor is gathered at a time.
    """
    local = {
        global_name(chunk, name): parameter.detach()
        for chunk in chunks_of(model)
        for name, parameter in chunk.named_parameters()
    }
    stages = parallel_state.get_pipeline_model_parallel_group()
    owners: list[set[str]] = [set(local)] * topology.pipeline_parallel_size
    if topology.pipeline_parallel_size > 1:
        owners = [set()] * topology.pipeline_parallel_size
        dist.all_gather_object(owners, set(local), group=stages)
    for entry in table:
        stage = next(s for s, names in enumerate(owners) if entry.megatron in names)
        full = None
        if stage == topology.pipeline_parallel_rank:
            full = _gather_tensor_parallel(entry, local[entry.megatron], topology)
        if topology.pipeline_parallel_size > 1:
            full = _broadcast_from_stage(full, stage, topology, stages)
        assert full is not None
        yield from zip(entry.hf, entry.layout.split(full), strict=True)


def _broadcast_from_stage(
    full: torch.Tensor | None, stage: int, topology: Topology, group: dist.ProcessGroup
) -> torch.Tensor:
    source = dist.get_global_rank(group, stage)
    header = [(full.shape, full.dtype) if full is not None else None]
    dist.broadcast_object_list(header, src=source, group=group)
    assert header[0] is not None
    shape, dtype = header[0]
    tensor = full.contiguous() if full is not None else torch.empty(shape, dtype=dtype, device=topology.device)
    dist.broadcast(tensor, src=source, group=group)
    return tensor


def tensor_infos(folder: Path, table: list[Entry], dtype: torch.dtype) -> list[TensorInfo]:
    """What `export_hf_tensors` will yield, from the headers of the original folder: nothing is read or gathered."""
    reader = HfReader(folder)
    infos = []
    for name in (part for entry in table for part in entry.hf):
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
