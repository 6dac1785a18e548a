"""Hugging Face folders and running models: weights read into a model, and a folder written from gathered tensors."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors import safe_open

from megatron_r1reward.checkpoint.streaming import check_finite, check_tie
from megatron_r1reward.files import publish_folder
from megatron_r1reward.model_folder import safetensors_layout as st
from megatron_r1reward.model_folder.config_reader import CONFIG
from megatron_r1reward.model_folder.dtypes import config_for
from megatron_r1reward.model_folder.folder_weights import read_folder_weights
from megatron_r1reward.model_folder.weight_table import Entry, WeightTable, global_name
from megatron_r1reward.models.head import fresh_score
from megatron_r1reward.types import TensorMeta

_SHARD_BYTES = 5 << 30  # of a file, as on the Hub


class HfReader:
    """Lazy access to the tensors of a model folder, by the names of its weight table, `table`.

    Raises:
        ValueError: as `read_folder_weights`.
    """

    def __init__(self, folder: Path) -> None:
        weights = read_folder_weights(folder, trainable=True)
        files = {place.meta.name: folder / file.name for file in weights.files for place in file.tensors}
        self.folder, self.table = folder, weights.table
        self.files = {name: (files[on_disk], on_disk) for name, on_disk in weights.on_disk.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        path, on_disk = self.files[name]
        with safe_open(path, framework="pt") as opened:
            return opened.get_tensor(on_disk)


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
def load_hf_weights(model: torch.nn.Module, folder: Path, table: WeightTable, *, seed: int = 0) -> None:
    """Copy every parameter of this rank's stage from `folder`. `table` is that of the model, as it names and cuts its
    parameters; how the folder stores them is the folder's own table's matter. A scalar head that the folder, of a
    language model, does not have is drawn from `seed`.

    Raises:
        ValueError: the folder's tensors are not those of its configuration, hold values that are not finite, or its LM
            head is not the embedding that it is tied to.
    """
    reader = HfReader(folder)
    tie = reader.table.tie
    stored = {entry.saved_as or entry.megatron: entry for entry in reader.table}
    for name, parameter in model.named_parameters():
        ours = table.by_megatron[global_name(model, name)]
        entry = stored.get(ours.saved_as or ours.megatron)
        if entry is None:
            parameter.copy_(fresh_score(ours, seed=seed))
            continue
        full = entry.layout.merge(tuple(entry.hf_part(reader[part]) for part in entry.hf))
        check_finite(full, f"{folder}: {' + '.join(entry.hf)}")
        if tie is not None and entry.megatron == tie.to and tie.hf in reader.files:
            check_tie(folder, tie.hf, reader[tie.hf], entry.hf[0], full)
        size, rank = tensor_parallel_place(ours)
        shard = ours.layout.shard(full, size, rank)
        if shard.shape != parameter.shape:
            raise ValueError(f"{entry.hf}: {tuple(shard.shape)} does not fit {name} {tuple(parameter.shape)}")
        parameter.copy_(shard)


def save_hf_folder(
    out: Path,
    metas: Sequence[TensorMeta],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    template: Path,
    write: bool,
    texts: Mapping[str, str | None] | None = None,
) -> None:
    """Write a checkpoint folder with `template`'s config, tokenizer and processor files, but for `texts`: other
    content by file name, None for a file that is left out.

    Every rank has to consume `tensors` (it is collective), which come in the order of `metas`; only the one with
    `write` touches the disk, one tensor at a time. The folder appears under its name only when it is complete.
    """
    if not write:
        for _ in tensors:
            pass
        return
    sides = st.side_files(template)  # a link that leads nowhere is found before anything is written
    staging = out.with_name(out.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    files = _shards(metas)
    stream = iter(tensors)
    for file in files:
        with (staging / file.name).open("wb") as handle:
            handle.write(file.header_bytes())
            for place in file.tensors:
                name, tensor = next(stream)
                assert TensorMeta.of(name, tensor) == place.meta, f"expected {place.meta}, got {name} {tensor.shape}"
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                handle.write(data)  # type: ignore[arg-type]
    assert next(stream, None) is None
    if len(files) > 1:
        (staging / st.INDEX).write_text(st.index_text(files))
    st.write_side_files(template, sides, staging, texts or {})
    text = (texts or {}).get(CONFIG) or (template / CONFIG).read_text()
    (staging / CONFIG).write_text(config_for(text, {m.dtype for m in metas}))
    publish_folder(staging, out)


def _shards(metas: Sequence[TensorMeta]) -> list[st.SafetensorsFile]:
    """The customary file names; a tensor above the limit has a file of its own."""
    groups: list[list[TensorMeta]] = [[]]
    size = 0
    for meta in metas:
        if groups[-1] and size + meta.num_bytes > _SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(meta)
        size += meta.num_bytes
    if len(groups) == 1:
        return [st.build_file(st.SINGLE, groups[0])]
    return [
        st.build_file(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]
