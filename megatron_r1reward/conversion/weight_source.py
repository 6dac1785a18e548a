"""Where a conversion takes weights from: a Hugging Face folder or a distributed checkpoint, seen the same way."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_r1reward.checkpoint import safetensors_layout as st
from megatron_r1reward.checkpoint.streaming import Sources
from megatron_r1reward.conversion.torch_dist_folder import FORMAT_FILE, TorchDistFolder
from megatron_r1reward.models.mapping import Entry, Views, WeightTable
from megatron_r1reward.models.registry import family_of, load_hf_config
from megatron_r1reward.types import TensorMeta

TEMPLATE = "hf"  # folder inside an imported checkpoint: configuration, tokenizer and the layout of the original files
_HEADERS = "headers.json"


@dataclass(frozen=True, kw_only=True)
class FolderTemplate:
    """Which files and tensors an exported folder has, and where its other files come from."""

    side_files: tuple[Path, ...]
    files: tuple[st.SafetensorsFile, ...]
    index: str | None  # the original index file's text

    def save(self, folder: Path) -> None:
        """Keep everything in `folder` that `load` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.side_files:
            (folder / path.name).write_bytes(path.read_bytes())
        tree = {"files": {f.name: f.header for f in self.files}, "index": self.index}
        (folder / _HEADERS).write_text(json.dumps(tree))


def load_weight_table(folder: Path) -> WeightTable:
    """The weight table for the model that `folder/config.json` describes; ValueError when it is not supported."""
    config = load_hf_config(folder)
    return family_of(config).weight_table(config)


def meta_template(folder: Path) -> FolderTemplate:
    """One file with every tensor of transformers' own model for `folder/config.json`, built without weights.

    The names are those of an index in the folder where there is one.

    Raises:
        ValueError: the index and the model do not have the same tensors.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    metas = [TensorMeta.of(name, tensor) for name, tensor in model.state_dict().items()]
    if config.tie_word_embeddings:
        metas = [meta for meta in metas if meta.name != "lm_head.weight"]
    if (folder / st.INDEX).is_file():
        table = load_weight_table(folder)
        names = {table.canonical(name): name for name in json.loads((folder / st.INDEX).read_text())["weight_map"]}
        metas = [replace(meta, name=names.pop(table.canonical(meta.name), meta.name)) for meta in metas]
        metas += [TensorMeta(name=name, dtype="bfloat16", shape=()) for name in names.values()]
    return FolderTemplate(side_files=(), files=(st.build_file(st.SINGLE, metas),), index=None)


def load_template(folder: Path) -> FolderTemplate:
    """From a Hugging Face folder, or from what `FolderTemplate.save` kept of one."""
    sides = tuple(path for path in st.side_files(folder) if path.name != _HEADERS)
    if (folder / _HEADERS).is_file():
        tree = json.loads((folder / _HEADERS).read_text())
        files = tuple(st.parse_header(name, header) for name, header in tree["files"].items())
        return FolderTemplate(side_files=sides, files=files, index=tree["index"])
    index = (folder / st.INDEX).read_text() if (folder / st.INDEX).is_file() else None
    return FolderTemplate(side_files=sides, files=tuple(st.read_folder(folder)), index=index)


def match_names(table: WeightTable, names: Sequence[str], where: Path) -> dict[str, str]:
    """The table's name -> the name on disk, with every name on both sides used exactly once.

    Raises:
        ValueError: names are missing, unknown or double; all are listed.
    """
    found: dict[str, str] = {}
    double = []
    for name in names:
        if table.canonical(name) in found:
            double.append(name)
        found[table.canonical(name)] = name
    expected = set(table.hf_names)
    optional = {table.tie.hf} if table.tie is not None else set()
    problems = {
        "missing": sorted(expected - set(found)),
        "unknown": sorted(found[n] for n in set(found) - expected - optional),
        "double": sorted(double),
    }
    if any(problems.values()):
        text = "; ".join(
            f"{len(v)} {kind}: {', '.join(v[:5])}{', ...' if len(v) > 5 else ''}" for kind, v in problems.items() if v
        )
        raise ValueError(f"{where}: the tensor names do not match the model family ({text})")
    return found


@dataclass(frozen=True, kw_only=True)
class HfTensor:
    """A Hugging Face tensor and how to get it: pieces whose bytes, one after another, are its own."""

    meta: TensorMeta
    views: Callable[[], Iterable[torch.Tensor]]


class WeightSource:
    """The weights of a folder of either kind, under the names that the template's files use.

    `without_values` reads headers only; where there are no weight files, names and shapes come from transformers.

    Raises:
        ValueError: the folder is neither kind, damaged, or does not match its model family.
    """

    def __init__(
        self, folder: Path, sources: Sources, *, template: Path | None = None, without_values: bool = False
    ) -> None:
        self.folder = folder
        self.is_distributed = (folder / FORMAT_FILE).is_file()
        self._sources = sources
        self._template_folder = template or self._default_template()
        self.table = load_weight_table(self._template_folder)
        has_files = any(self._template_folder.glob("*.safetensors")) or (self._template_folder / _HEADERS).is_file()
        if without_values and not has_files:
            self.template = meta_template(self._template_folder)
        else:
            self.template = load_template(self._template_folder)
        names = [t.meta.name for f in self.template.files for t in f.tensors]
        self.on_disk = match_names(self.table, names, self._template_folder)
        self._dist = TorchDistFolder(folder, sources) if self.is_distributed else None
        self._places = {t.meta.name: t for f in self.template.files for t in f.tensors}
        self._entries: dict[str, list[tuple[Entry, int]]] = {}
        for entry in self.table:
            for part, name in enumerate(entry.hf):
                self._entries.setdefault(name, []).append((entry, part))

    def _default_template(self) -> Path:
        if not self.is_distributed:
            return self.folder
        if (self.folder / TEMPLATE).is_dir():
            return self.folder / TEMPLATE
        state = self.folder / "state.json"
        if state.is_file():
            return Path(json.loads(state.read_text())["config"]["model"]["path"])
        raise ValueError(f"{self.folder} keeps no Hugging Face files: name the original folder with --template")

    def meta(self, name: str) -> torch.Tensor:
        """A Hugging Face tensor, by the table's name, without its values."""
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
        """By its name on disk."""
        meta = self._places[name].meta
        if self._dist is None:
            return HfTensor(meta=meta, views=lambda: [self._from_folder(name)])
        canonical = self.table.canonical(name)
        if self.table.tie is not None and canonical == self.table.tie.hf:
            canonical = self.table.by_megatron[self.table.tie.to].hf[0]
        entries = self._entries[canonical]
        return HfTensor(meta=replace(meta, dtype=self._saved_dtype(entries[0][0])), views=lambda: self._export(entries))

    def _saved_dtype(self, entry: Entry) -> str:
        assert self._dist is not None
        key = self.table.checkpoint_key(entry).key
        if key not in self._dist.tensors:
            raise ValueError(f"{self.folder} has no parameter {key}: is it a checkpoint of this model?")
        return str(self._dist.tensors[key].properties.dtype).removeprefix("torch.")

    def _export(self, entries: list[tuple[Entry, int]]) -> Views:
        assert self._dist is not None
        views: Views = []
        for entry, part in entries:
            full = self._dist.parameter(self.table.checkpoint_key(entry))
            views += entry.layout.split_views(full)[part]
        return views

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
