"""Where a conversion takes weights from: a Hugging Face folder or a distributed checkpoint, seen the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_r1reward.files import read_json
from megatron_r1reward.model_folder import prompt_policy
from megatron_r1reward.model_folder import safetensors_layout as st
from megatron_r1reward.model_folder.beside_weights import check_files
from megatron_r1reward.model_folder.config_reader import CONFIG
from megatron_r1reward.model_folder.folder_weights import (
    FolderWeights,
    match_names,
    match_weights,
    read_folder_weights,
    weight_table,
)
from megatron_r1reward.model_folder.other_folder import is_distributed
from megatron_r1reward.model_folder.scalar_folder import scalar_config
from megatron_r1reward.model_folder.shape import ModelShape, load_shape
from megatron_r1reward.model_folder.weight_table import Entry, Views, WeightTable
from megatron_r1reward.types import TensorMeta

if TYPE_CHECKING:  # headers are looked at without torch, which takes seconds to import
    import torch

    from megatron_r1reward.checkpoint.streaming import Sources
    from megatron_r1reward.conversion.torch_dist_folder import TorchDistFolder

TEMPLATE = "hf"  # folder inside an imported checkpoint: configuration, tokenizer and the layout of the original files
HEADERS = "headers.json"


@dataclass(frozen=True, kw_only=True)
class FolderTemplate:
    """Which files and tensors an exported folder has, and where its other files come from. `side_files` are relative
    to `folder`."""

    folder: Path
    side_files: tuple[str, ...]
    weights: FolderWeights

    def config(self) -> str:
        """The text of config.json, which says which head the weights have."""
        text, layers = (self.folder / CONFIG).read_text(), self.weights.shape.score_layers
        return scalar_config(text, layers) if layers != load_shape(self.folder).score_layers else text

    def save(self, folder: Path) -> None:
        """Keep everything in `folder` that `load_template` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        st.write_side_files(self.folder, self.side_files, folder, {})
        tree = {"files": {f.name: f.header for f in self.weights.files}, "index": self.weights.index}
        (folder / HEADERS).write_text(json.dumps(tree))


def planned_weights(folder: Path) -> FolderWeights:
    """The weights that `folder/config.json` describes, in bfloat16 and one file, where there are no weight files. The
    names are those of an index in the folder where there is one.

    Raises:
        ValueError: the configuration is not supported, or index and configuration name other tensors.
    """
    shape = load_shape(folder)
    check_files(folder)
    names = list(st.read_index(folder / st.INDEX)) if (folder / st.INDEX).is_file() else []
    table = weight_table(shape, [TensorMeta(name=name, dtype="bfloat16", shape=()) for name in names])
    on_disk = match_names(table, names, folder) if names else {name: name for name in table.hf_shapes}
    metas = [TensorMeta(name=on_disk[n], dtype="bfloat16", shape=size) for n, size in table.hf_shapes.items()]
    return match_weights(folder, shape, (st.build_file(st.SINGLE, metas),), None)


def load_template(folder: Path) -> FolderTemplate:
    """From a Hugging Face folder, or from what `FolderTemplate.save` kept of one.

    Raises:
        ValueError: as `read_folder_weights`; or a file beside the weights is damaged.
    """
    shape = load_shape(folder)
    check_files(folder)
    sides = tuple(name for name in st.side_files(folder) if name != HEADERS)
    if (folder / HEADERS).is_file():
        tree = read_json(folder / HEADERS)
        files = tuple(st.parse_header(name, header) for name, header in tree["files"].items())
        weights = match_weights(folder, shape, files, tree["index"])
    else:
        weights = read_folder_weights(folder)
    return FolderTemplate(folder=folder, side_files=sides, weights=weights)


def template_for(
    folder: Path, *, template: Path | None = None, without_values: bool = False, critic: bool = False
) -> FolderTemplate:
    """What a folder of either kind is to look like as a Hugging Face folder; see `WeightSource`, which begins with it.

    Raises:
        ValueError: as there, but for the tensors of a distributed checkpoint.
    """
    place = template or (template_of(folder, critic=critic) if is_distributed(folder) else folder)
    if without_values and not any(place.glob("*.safetensors")) and not (place / HEADERS).is_file():
        return FolderTemplate(folder=place, side_files=(), weights=planned_weights(place))
    return load_template(place)


def with_scalar_head(template: FolderTemplate, layers: int) -> FolderTemplate:
    """The template of the same model with a scalar head of `layers` layers in place of its LM head; the head's tensors
    follow the others of the last file."""
    weights = template.weights
    text = replace(weights.shape.text, tied=False)
    shape = replace(weights.shape, text=text, score_layers=layers)
    metas = [[place.meta for place in file.tensors] for file in weights.files]
    table = weight_table(shape, [meta for group in metas for meta in group])
    dropped = {on_disk for ours, on_disk in weights.on_disk.items() if ours not in table.hf_shapes}
    dtype = metas[0][0].dtype
    head = [
        TensorMeta(name=name, dtype=dtype, shape=size)
        for name, size in table.hf_shapes.items()
        if name not in weights.on_disk
    ]
    groups = [[meta for meta in group if meta.name not in dropped] for group in metas]
    groups[-1] += head
    files = tuple(st.build_file(file.name, group) for file, group in zip(weights.files, groups, strict=True) if group)
    index = None if weights.index is None else st.index_text(list(files))
    return replace(template, weights=match_weights(template.folder, shape, files, index))


def head_of(checkpoint: Path, *, critic: bool = False) -> int:
    """Layers of the scalar head of the model (or of the critic) that a training checkpoint holds; 0 for an LM head, and
    for an import."""
    state = checkpoint / "state.json"
    if critic:
        return int(_critic_of(checkpoint)["layers"])
    return int(read_json(state).get("score_layers", 0)) if state.is_file() else 0


def _critic_of(checkpoint: Path) -> dict[str, Any]:
    """What a training checkpoint says about its critic: the folder that it began with, and its head.

    Raises:
        ValueError: there is none.
    """
    state = checkpoint / "state.json"
    found = read_json(state).get("critic") if state.is_file() else None
    if not found:
        raise ValueError(f"{checkpoint} holds no critic: leave --critic out")
    critic: dict[str, Any] = found
    return critic


@dataclass(frozen=True, kw_only=True)
class HfTensor:
    """A Hugging Face tensor and how to get it: pieces whose bytes, one after another, are its own."""

    meta: TensorMeta
    views: Callable[[], Iterable[torch.Tensor]]


class WeightSource:
    """The weights of a folder of either kind, under the names that the template's files use.

    `without_values` reads headers only; where there are no weight files, names and shapes follow from `config.json`.
    `critic`: those of the critic that a training checkpoint holds beside the policy.

    Raises:
        ValueError: the folder is neither kind, damaged, or does not match its configuration or its template.
    """

    def __init__(
        self,
        folder: Path,
        sources: Sources,
        *,
        template: Path | None = None,
        without_values: bool = False,
        critic: bool = False,
    ) -> None:
        self.folder, self.critic = folder, critic
        self.is_distributed = is_distributed(folder)
        self._sources = sources
        self.template = template_for(folder, template=template, without_values=without_values, critic=critic)
        layers = head_of(folder, critic=critic) if self.is_distributed else 0
        if layers and not self.template.weights.shape.score_layers:  # trained from a language model
            self.template = with_scalar_head(self.template, layers)
        self.table, self.on_disk = self.template.weights.table, self.template.weights.on_disk
        self._dist: TorchDistFolder | None = None
        if self.is_distributed:
            from megatron_r1reward.conversion.torch_dist_folder import TorchDistFolder

            self._dist = TorchDistFolder(folder, sources, critic=critic)
            self._dist.check(self.table, where=f"{folder}, against the configuration in {self.template.folder}")
        self._places = {t.meta.name: t for f in self.template.weights.files for t in f.tensors}
        self._entries: dict[str, list[tuple[Entry, int]]] = {}
        for entry in self.table:
            for part, name in enumerate(entry.hf):
                self._entries.setdefault(name, []).append((entry, part))

    @property
    def shape(self) -> ModelShape:
        return self.template.weights.shape

    def meta(self, name: str) -> torch.Tensor:
        """A Hugging Face tensor, by the table's name, without its values."""
        import torch

        meta = self._places[self.on_disk[name]].meta
        return torch.empty(meta.shape, dtype=meta.torch_dtype, device="meta")

    def megatron_parts(self, entry: Entry) -> tuple[torch.Tensor, ...]:
        """The Hugging Face tensors (or the expert's elements of them) of one entry, from a Hugging Face folder."""
        return tuple(entry.hf_part(self._from_folder(self.on_disk[name])) for name in entry.hf)

    def _from_folder(self, name: str) -> torch.Tensor:
        place = self._places[name]
        file = self._sources.open(self.folder / place.file)
        return file.tensor(place.offset, place.length, place.meta.torch_dtype, place.meta.shape)

    def tensor(self, name: str) -> HfTensor:
        """By its name on disk. In a distributed checkpoint it has the dtype that is saved there."""
        meta = self._places[name].meta
        if self._dist is None:
            return HfTensor(meta=meta, views=lambda: [self._from_folder(name)])
        canonical = self.table.canonical(name)
        if self.table.tie is not None and canonical == self.table.tie.hf:
            canonical = self.table.by_megatron[self.table.tie.to].hf[0]
        entries = self._entries[canonical]
        dtype = self._dist.dtype(self.table.checkpoint_key(entries[0][0]))
        return HfTensor(meta=replace(meta, dtype=dtype), views=lambda: self._export(entries))

    def _export(self, entries: list[tuple[Entry, int]]) -> Views:
        assert self._dist is not None
        views: Views = []
        for entry, part in entries:
            full = self._dist.parameter(self.table.checkpoint_key(entry))
            views += entry.layout.split_views(full)[part]
        return views

    def said_by_training(self) -> dict[str, str | None]:
        """Files of a training checkpoint that replace those of the folder that it began with; None: to be left out."""
        state = self.folder / "state.json"
        if not self.is_distributed or not state.is_file():
            return {}
        if self.critic:  # it is no reward model
            return {prompt_policy.FILE: None, "README.md": None}
        tree = read_json(state)
        said = {name: tree[name] for name in (prompt_policy.FILE,) if name in tree}  # not in older checkpoints
        return {**said, "README.md": None} if said else {}

    def description(self) -> dict[str, Any]:
        """What identifies the source, so that an interrupted conversion is only continued from the same one."""
        names = {t.file for t in self._places.values()}
        if self._dist is not None:
            names = {info.relative_path for info in self._dist.storage.values()}
        stats = {name: (self.folder / name).stat() for name in sorted(names)}
        return {
            "folder": str(self.folder.resolve()),
            "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        }


def weight_table_of_template(folder: Path, checkpoint: Path) -> WeightTable:
    """The table of a template folder's configuration, whose parameters `checkpoint` has to hold."""
    shape, layers = load_shape(folder), head_of(checkpoint)
    if layers and not shape.score_layers:
        shape = replace(shape, text=replace(shape.text, tied=False), score_layers=layers)
    return weight_table(shape)


def template_of(checkpoint: Path, *, critic: bool = False) -> Path:
    """The Hugging Face folder that a distributed checkpoint belongs to: what an import kept inside it, or the
    `model.path` of the run that saved it; or the one that its critic began with.

    Raises:
        ValueError: it keeps none, or that folder is not there.
    """
    if (checkpoint / TEMPLATE).is_dir():
        return checkpoint / TEMPLATE
    state = checkpoint / "state.json"
    if not state.is_file():
        raise ValueError(f"{checkpoint} keeps no Hugging Face files: name the original folder with --template")
    try:
        tree = json.loads(state.read_text())
        path = Path(_critic_of(checkpoint)["path"] if critic else tree["config"]["model"]["path"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{state} is damaged ({error}): name the original folder with --template") from error
    started_in = tree.get("working_directory")
    places = [path] if path.is_absolute() or started_in is None else [Path(started_in) / path, path]
    for place in places:
        if (place / "config.json").is_file():
            return place
    relative = "" if path.is_absolute() else f", relative to the directory in which the run was started ({started_in})"
    raise ValueError(
        f"{checkpoint} was trained from the model folder {path}{relative}, and there is no config.json now: name the "
        "folder with --template"
    )
