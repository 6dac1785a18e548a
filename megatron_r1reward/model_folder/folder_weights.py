"""The one place where the tensors of a model folder are compared with its `config.json`: names, shapes and spellings.

Import, export and its template, verify, inspect and the start of training all read a folder through
`read_folder_weights`, so that what one of them accepts, every other one does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_r1reward.model_folder import safetensors_layout as st
from megatron_r1reward.model_folder import table_qwen2_5_vl, table_qwen3_vl
from megatron_r1reward.model_folder.shape import ModelShape, load_shape
from megatron_r1reward.model_folder.weight_table import GatedMLP, WeightTable
from megatron_r1reward.types import TensorMeta

MAX_NAMED = 5  # tensors of each kind that a message names
# Rotary frequencies, which older versions of transformers saved: they follow from the configuration.
_BUFFER = re.compile(r"(^|\.)rotary(_pos)?_emb\.(original_)?inv_freq$")
_SEPARATE_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")
_SCALE = "weight_scale"  # of a quantized linear: one float per output row


@dataclass(frozen=True, kw_only=True)
class FolderWeights:
    """The weight files of a folder whose tensors are exactly those that its configuration describes.

    `on_disk`: the table's name -> the name in the files. `extra`: names beside them that hold no weights of the table:
    rotary buffers, and the scales of a quantized folder.
    """

    folder: Path
    shape: ModelShape
    table: WeightTable
    files: tuple[st.SafetensorsFile, ...]
    index: str | None  # text of the index file
    on_disk: dict[str, str]
    extra: frozenset[str]

    @property
    def has_transposed_experts(self) -> bool:
        """Stacked as transformers' modules hold them, which vLLM does not read."""
        layouts = [entry.layout for entry in self.table if entry.stacked]
        return any(isinstance(layout, GatedMLP) and not layout.transposed for layout in layouts)


def weight_table(shape: ModelShape, metas: Sequence[TensorMeta] = ()) -> WeightTable:
    """The table of a model; where `metas` hold experts in another way than published folders, the table for those."""
    if shape.family == "qwen2_5_vl":
        return table_qwen2_5_vl.weight_table(shape)
    if any(_SEPARATE_EXPERT.search(meta.name) for meta in metas):
        return table_qwen3_vl.weight_table(shape, "separate")
    published = table_qwen3_vl.weight_table(shape)
    if shape.text.experts is None:
        return published
    stacked = {name for entry in published if entry.stacked for name in entry.hf}
    there = {meta.name: meta.shape for meta in metas if meta.name in stacked}
    modules = table_qwen3_vl.weight_table(shape, "modules")
    return modules if there and all(modules.hf_shapes[name] == there[name] for name in there) else published


def read_folder_weights(folder: Path, *, trainable: bool = False) -> FolderWeights:
    """Read `config.json` and the headers of the weight files, and compare them.

    Args:
        trainable: the weights are about to be trained, so quantized ones are refused.

    Raises:
        ValueError: the configuration or a file cannot be used, or tensors are missing, unknown, double or of another
            shape than the configuration says; the message names them.
    """
    shape = load_shape(folder)
    if trainable and shape.quantized is not None:
        raise ValueError(
            f"{folder} holds weights quantized by {shape.quantized!r}, which are for serving: train the folder that "
            "they were made from"
        )
    files = tuple(st.read_folder(folder))
    index = (folder / st.INDEX).read_text() if (folder / st.INDEX).is_file() else None
    if index is None and len(files) > 1:  # shards that lost it
        index = st.index_text(list(files))
    return match_weights(folder, shape, files, index)


def match_weights(
    folder: Path, shape: ModelShape, files: tuple[st.SafetensorsFile, ...], index: str | None
) -> FolderWeights:
    """`read_folder_weights` for files whose headers are known already.

    Raises:
        ValueError: as there.
    """
    metas = [place.meta for file in files for place in file.tensors]
    table = weight_table(shape, metas)
    extra = _extra(shape, table, metas)
    found = match_names(table, [meta.name for meta in metas if meta.name not in extra], folder)
    shapes = {meta.name: meta.shape for meta in metas}
    wanted = dict(table.hf_shapes)
    if table.tie is not None:
        wanted[table.tie.hf] = wanted[table.by_megatron[table.tie.to].hf[0]]
    wrong = [
        f"{name} {list(shapes[name])} instead of {list(wanted[ours])}"
        for ours, name in found.items()
        if shapes[name] != wanted[ours]
    ]
    if wrong:
        raise ValueError(
            f"{folder}: tensors have other shapes than config.json says ({_some(wrong)}): take configuration and "
            "weights from one model, e.g. set vocab_size to the rows that the embedding has"
        )
    return FolderWeights(
        folder=folder, shape=shape, table=table, files=files, index=index, on_disk=found, extra=frozenset(extra)
    )


def _extra(shape: ModelShape, table: WeightTable, metas: Sequence[TensorMeta]) -> set[str]:
    extra = {meta.name for meta in metas if _BUFFER.search(meta.name)}
    if shape.quantized is None:
        return extra
    rows = {name: size[0] for name, size in table.hf_shapes.items() if name.endswith(".weight")}
    for meta in metas:
        weight = table.canonical(meta.name).removesuffix(_SCALE) + "weight"
        if meta.name.endswith(f".{_SCALE}") and meta.shape == (rows.get(weight), 1):
            extra.add(meta.name)
    return extra


def match_names(table: WeightTable, names: Sequence[str], where: Path) -> dict[str, str]:
    """The table's name -> the name on disk, with every name on both sides used exactly once.

    Raises:
        ValueError: names are missing, unknown or double; of each kind some are named.
    """
    found: dict[str, str] = {}
    double = []
    for name in names:
        if table.canonical(name) in found:
            double += [name]
        found[table.canonical(name)] = name
    expected = set(table.hf_shapes)
    optional = {table.tie.hf} if table.tie is not None else set()
    problems = {
        "missing": sorted(expected - set(found)),
        "unknown": sorted(found[n] for n in set(found) - expected - optional),
        "double": sorted(double),
    }
    if any(problems.values()):
        text = "; ".join(f"{len(some)} {kind}: {_some(some)}" for kind, some in problems.items() if some)
        raise ValueError(
            f"{where}: the tensor names do not match config.json ({text}): take configuration and weights from one "
            "model"
        )
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
