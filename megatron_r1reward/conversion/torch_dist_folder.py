"""megatron-core's distributed checkpoint format ("torch_dist") read and written without process groups or a model.

A folder holds `.distcp` files with one `torch.save` archive per tensor chunk, torch's pickled `.metadata` that says
where each chunk of each global tensor lies, `common.pt` and `metadata.json`. Equal layers (and the experts of a layer)
are slices along leading axes of one global tensor. What is written here, `dist_checkpointing.load` reads under any
layout; what training writes under any layout, `TorchDistFolder` reads.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_r1reward.checkpoint.dist import CRITIC
from megatron_r1reward.checkpoint.streaming import Sources
from megatron_r1reward.files import write_text
from megatron_r1reward.model_folder.other_folder import FORMAT_FILE
from megatron_r1reward.model_folder.weight_table import CheckpointKey, Entry, Layout, Shape, Vocabulary, WeightTable
from megatron_r1reward.types import TensorMeta

_FORMAT = (
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, '
    '"common_backend": "torch", "common_backend_version": 1}'
)
_ALIGNMENT = 64
_NOT_WEIGHTS = ("optimizer.", "random_state", "chained_", CRITIC)  # what training saves beside them


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The bytes of `torch.save(tensor)` around the tensor's own."""

    prefix: bytes
    suffix: bytes

    def length(self, data_bytes: int) -> int:
        return len(self.prefix) + data_bytes + len(self.suffix)


@cache
def archive(dtype: torch.dtype, shape: tuple[int, ...]) -> Archive:
    """What `torch.save` writes around a contiguous tensor of this dtype and shape."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "archive.pt"
        with torch.serialization.skip_data():  # a sparse file: the values' place is left empty
            torch.save(torch.empty(shape, dtype=dtype), path)
        with path.open("rb") as handle:
            _, start = _locate(handle, 0, path.stat().st_size)
            handle.seek(0)
            prefix = handle.read(start)
            handle.seek(start + torch.Size(shape).numel() * dtype.itemsize)
            return Archive(prefix=prefix, suffix=handle.read())


def _view(handle: IO[bytes], offset: int, length: int) -> IO[bytes]:
    return cast(IO[bytes], _create_file_view(cast(Any, handle), offset, length))


def _locate(handle: IO[bytes], offset: int, length: int) -> tuple[torch.Tensor, int]:
    """The archived tensor without its values, and the absolute position of its storage."""
    with FakeTensorMode():
        tensor = torch.load(_view(handle, offset, length), weights_only=True)
    start = tensor.untyped_storage()._checkpoint_offset
    return tensor, offset + int(start)


def _archived(handle: IO[bytes], info: _StorageInfo, key: str) -> tuple[torch.Tensor, int]:
    """`_locate` of a checkpoint's tensor; ValueError where the file is damaged there."""
    try:
        return _locate(handle, info.offset, info.length)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{handle.name}: the archive of {key} at {info.offset} is damaged ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One full parameter (a layer, an expert) to write: its place in the global tensor and in the files."""

    key: CheckpointKey
    shape: tuple[int, ...]  # of the parameter, without the leading axes
    dtype: torch.dtype
    file: str
    offset: int
    length: int


def aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def write_index(folder: Path, chunks: Iterable[Chunk], content: dict[str, Any]) -> None:
    """Write `.metadata`, `common.pt` and `metadata.json` for chunks that are already in their files."""
    by_key: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        by_key.setdefault(chunk.key.key, []).append(chunk)
    tensors, storage = {}, {}
    for key, members in by_key.items():
        axes = tuple(max(numbers) + 1 for numbers in zip(*(m.key.index for m in members), strict=True))
        if len(members) != torch.Size(axes).numel():
            raise ValueError(f"checkpoint tensor {key} needs {torch.Size(axes).numel()} parts, got {len(members)}")
        places = []
        for number, m in enumerate(members):
            offsets = torch.Size((*m.key.index, *(0 for _ in m.shape)))
            places.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size((*(1 for _ in axes), *m.shape))))
            storage[MetadataIndex(key, offsets, number)] = _StorageInfo(m.file, m.offset, m.length)
        tensors[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=members[0].dtype),
            size=torch.Size((*axes, *members[0].shape)),
            chunks=places,
        )
    metadata = Metadata(state_dict_metadata=tensors, planner_data=None, storage_data=storage)  # type: ignore[arg-type]
    metadata.storage_meta = StorageMeta(checkpoint_id=folder.name, save_id=None)
    with (folder / ".metadata").open("wb") as handle:
        pickle.dump(metadata, handle)
    torch.save({"content_metadata": content}, folder / "common.pt")
    write_text(folder / FORMAT_FILE, _FORMAT)


@cache
def _merged_shape(layout: Layout, shapes: tuple[Shape, ...]) -> Shape:
    return tuple(layout.merge(tuple(torch.empty(shape, device="meta") for shape in shapes)).shape)


def megatron_shape(entry: Entry) -> Shape:
    """Of the full parameter, without padding."""
    return _merged_shape(entry.layout, tuple(shape[1:] if entry.stacked else shape for shape in entry.shapes))


def _same_shape(entry: Entry, saved: Shape) -> bool:
    """Whether a parameter of shape `saved` is this entry's; a vocabulary may be padded."""
    wanted = megatron_shape(entry)
    if isinstance(entry.layout, Vocabulary):
        return len(saved) == 2 and saved[0] >= wanted[0] and saved[1] == wanted[1]
    return saved == wanted


class TorchDistFolder:
    """Lazy access to the parameters of a distributed checkpoint, however it was cut when it was saved; or to those of
    the `critic` that it holds, under the names of any model.

    `.metadata` is a pickle, as megatron-core itself writes and reads it: open only checkpoints that you trust.

    Raises:
        ValueError: the folder is no complete distributed checkpoint.
    """

    def __init__(self, folder: Path, sources: Sources, *, critic: bool = False) -> None:
        if not (folder / FORMAT_FILE).is_file() or not (folder / ".metadata").is_file():
            raise ValueError(f"{folder} is no complete distributed checkpoint: {FORMAT_FILE} or .metadata is missing")
        self.folder = folder
        self._sources = sources
        try:
            metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:  # a torn pickle raises whatever its bytes lead to
            raise ValueError(f"{folder / '.metadata'} is damaged ({type(error).__name__}: {error})") from error
        prefix = CRITIC if critic else ""
        self.tensors = {
            key.removeprefix(prefix): entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and key.startswith(prefix)
        }
        self.storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self._places: dict[tuple[str, tuple[int, ...]], _StorageInfo] = {
            (index.fqn.removeprefix(prefix), tuple(index.offset)): info
            for index, info in self.storage.items()
            if index.offset is not None and index.fqn.startswith(prefix)
        }

    def metas(self) -> list[TensorMeta]:
        """Every global tensor, those of the optimizer too."""
        return [
            TensorMeta(name=key, dtype=str(t.properties.dtype).removeprefix("torch."), shape=tuple(t.size))
            for key, t in self.tensors.items()
        ]

    def check(self, table: WeightTable, *, where: str) -> None:
        """ValueError unless the checkpoint holds the parameters of `table`, with these shapes, and no others."""
        problems, lengths = [], dict[str, list[int]]()
        for entry in table:
            key = table.checkpoint_key(entry)
            lengths.setdefault(key.key, [0] * len(key.index))
            lengths[key.key] = [max(n, i + 1) for n, i in zip(lengths[key.key], key.index, strict=True)]
            saved = self.tensors.get(key.key)
            if saved is None or not _same_shape(entry, tuple(saved.size[len(key.index) :])):
                found = "missing" if saved is None else f"{list(saved.size[len(key.index) :])}"
                problems.append(f"{entry.megatron} is {found} instead of {list(megatron_shape(entry))}")
        for name, axes in lengths.items():
            if name in self.tensors and list(self.tensors[name].size[: len(axes)]) != axes:
                problems.append(f"{name} has {list(self.tensors[name].size[: len(axes)])} parts instead of {axes}")
        for name in self.tensors:
            if name not in lengths and not name.startswith(_NOT_WEIGHTS) and "_extra_state" not in name:
                problems.append(f"{name} is unknown")
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(
                f"{where}: the checkpoint is of another model ({'; '.join(problems[:3])}{more}): name the folder that "
                "it was made from with --template"
            )

    def dtype(self, key: CheckpointKey) -> str:
        """Of one parameter, which may differ from layer to layer: torch's name without the prefix."""
        pieces = self._pieces(key)
        info = self._places[key.key, tuple(pieces[0].offsets)]
        with self._sources.open(self.folder / info.relative_path).path.open("rb") as handle:
            return str(_archived(handle, info, key.key)[0].dtype).removeprefix("torch.")

    def _pieces(self, key: CheckpointKey) -> list[ChunkStorageMetadata]:
        axes = len(key.index)
        entry = self.tensors.get(key.key)
        pieces = [c for c in entry.chunks if tuple(c.offsets[:axes]) == key.index] if entry is not None else []
        if not pieces:
            raise ValueError(f"{self.folder} has no parameter {key.key} at {list(key.index)}")
        return pieces

    def parameter(self, key: CheckpointKey) -> torch.Tensor:
        """The parameter at `key`; a view of the file where it was saved in one piece, else put together in memory.

        Raises:
            ValueError: the checkpoint does not hold it, or a file is damaged.
        """
        axes, pieces = len(key.index), self._pieces(key)
        entry = self.tensors[key.key]
        shape = tuple(entry.size[axes:])
        if len(pieces) == 1 and tuple(pieces[0].sizes[axes:]) == shape:
            return self._chunk(key.key, pieces[0]).reshape(shape)
        full = torch.empty(shape, dtype=entry.properties.dtype)
        covered = 0
        for piece in pieces:
            area = tuple(slice(o, o + s) for o, s in zip(piece.offsets[axes:], piece.sizes[axes:], strict=True))
            full[area] = self._chunk(key.key, piece).reshape(piece.sizes[axes:])
            covered += piece.sizes.numel()
        if covered != full.numel():
            raise ValueError(f"{self.folder}: the pieces of {key.key} do not make the whole")
        return full

    def _chunk(self, key: str, piece: ChunkStorageMetadata) -> torch.Tensor:
        info = self._places[key, tuple(piece.offsets)]
        file = self._sources.open(self.folder / info.relative_path)
        with file.path.open("rb") as handle:  # a position of its own: other threads read this file too
            fake, start = _archived(handle, info, key)
            if fake.is_contiguous() and fake.storage_offset() == 0:
                return file.tensor(start, fake.numel() * fake.element_size(), fake.dtype, tuple(fake.shape))
            whole: torch.Tensor = torch.load(_view(handle, info.offset, info.length), weights_only=True)
            return whole
