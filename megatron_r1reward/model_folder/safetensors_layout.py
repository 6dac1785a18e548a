"""Weight files at the level of bytes: where every tensor lies, and how to write a folder that equals another.

The safetensors format: 8 bytes header length (little endian), a JSON header, then the tensors' bytes back to back.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_r1reward.files import LFS_POINTER
from megatron_r1reward.types import TensorMeta

log = logging.getLogger(__name__)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_MAX_HEADER = 100 << 20  # the format's own limit

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
DTYPE_CODES = {ours: code for code, ours in DTYPES.items()}
# Weights, here or in another format, and what training left: they do not travel with converted weights.
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".distcp"}
)
_NOT_SIDE_FILES = frozenset({INDEX, "pytorch_model.bin.index.json", "trainer_state.json", "manifest.json"})


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """A tensor in a file: `length` bytes from absolute position `offset`."""

    meta: TensorMeta
    file: str
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class SafetensorsFile:
    """Name, header text and size of one file; its tensors are in the order of their bytes."""

    name: str
    header: str
    tensors: tuple[TensorPlace, ...]

    @property
    def data_start(self) -> int:
        return 8 + len(self.header.encode())

    @property
    def size(self) -> int:
        return max((t.offset + t.length for t in self.tensors), default=self.data_start)

    def header_bytes(self) -> bytes:
        encoded = self.header.encode()
        return struct.pack("<Q", len(encoded)) + encoded


def parse_header(name: str, header: str) -> SafetensorsFile:
    """ValueError when the header's offsets, shapes and dtypes do not agree."""
    tree = json.loads(header)
    start = 8 + len(header.encode())
    tensors = []
    for tensor, entry in tree.items():
        if tensor == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name}: tensor {tensor} has dtype {entry['dtype']!r}; supported: {', '.join(DTYPES)}")
        meta = TensorMeta(name=tensor, dtype=DTYPES[entry["dtype"]], shape=tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        if end - begin != meta.num_bytes:
            raise ValueError(f"{name}: tensor {tensor} takes {end - begin} bytes, its shape says {meta.num_bytes}")
        tensors.append(TensorPlace(meta=meta, file=name, offset=start + begin, length=end - begin))
    tensors.sort(key=lambda t: t.offset)
    return SafetensorsFile(name=name, header=header, tensors=tuple(tensors))


def read_file(path: Path) -> SafetensorsFile:
    """Parse one file's header and check that the file is as long as it says.

    Raises:
        ValueError: the file is truncated, or not in the format.
    """
    with path.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
        if prefix == LFS_POINTER[:8]:
            raise ValueError(f"{path} is a pointer of git-lfs, not the file itself: run git lfs pull in its folder")
        if length > _MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file")
        raw = handle.read(length)
    try:
        parsed = parse_header(path.name, raw.decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the safetensors header is damaged ({error}): download it again") from error
    if path.stat().st_size != parsed.size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its header says {parsed.size}: download it again")
    return parsed


def build_file(name: str, metas: list[TensorMeta]) -> SafetensorsFile:
    """The layout of a new file that holds `metas` in this order."""
    tree: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for meta in metas:
        tree[meta.name] = {
            "dtype": DTYPE_CODES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [position, position + meta.num_bytes],
        }
        position += meta.num_bytes
    header = json.dumps(tree, separators=(",", ":"))
    return parse_header(name, header + " " * (-len(header.encode()) % 8))  # tensors start at a multiple of 8


def read_folder(folder: Path) -> list[SafetensorsFile]:
    """The safetensors files of a checkpoint folder, in order of their names. Shards without an index are read where
    their names say that all are there.

    Raises:
        ValueError: there are none, or one that the index names is missing or damaged, or a tensor occurs twice.
    """
    index = folder / INDEX
    weight_map = read_index(index) if index.is_file() else None
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        names = _shard_names(folder)
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing, but {INDEX} names it: download it again")
    files = [read_file(folder / name) for name in names]
    places = {t.meta.name: t.file for f in files for t in f.tensors}
    if len(places) != sum(len(f.tensors) for f in files):
        raise ValueError(f"{folder}: a tensor occurs in two files: remove the one that does not belong here")
    for name, file in (weight_map or {}).items():
        if places.get(name) != file:
            raise ValueError(
                f"{folder}: {INDEX} says that {name} is in {file}, which does not hold it: take index and "
                "files from one download"
            )
    return files


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the text of an index; ValueError when it is none."""
    try:
        found = json.loads(index.read_text())["weight_map"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of weight files ({error}): download it again") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{index}: weight_map names no tensors: download it again")
    for name, file in found.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise ValueError(f"{index}: weight_map gives {name} the file {file!r}, which is no safetensors file here")
    return found


def _shard_names(folder: Path) -> list[str]:
    """All shards of a folder that lost its index; ValueError where they are not complete, or the folder holds
    something else."""
    shards = {path.name: found for path in folder.glob("*.safetensors") if (found := _SHARD.fullmatch(path.name))}
    if shards:
        total = max(int(found[2]) for found in shards.values())
        wanted = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
        if sorted(shards) != wanted:
            missing = sorted(set(wanted) - set(shards))
            raise ValueError(f"{folder}: {', '.join(missing[:3])} and {INDEX} are missing: download them")
        return wanted
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, no model: merge it into its base model and give that folder")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ValueError(f"{folder} holds weights as pickles: save them as safetensors")
    raise ValueError(f"{folder} holds no {SINGLE} and no {INDEX}: download the weights, or give another folder")


def index_text(files: list[SafetensorsFile]) -> str:
    total = sum(t.length for f in files for t in f.tensors)
    weight_map = {t.meta.name: f.name for f in files for t in f.tensors}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )


def side_files(folder: Path) -> list[str]:
    """Names, relative to `folder`, of all files that travel with its weights: configuration, tokenizer, processor,
    code, documentation, and whatever else lies there or below. Hidden files and other weights stay behind; the log
    names the latter.

    Raises:
        ValueError: a link leads nowhere.
    """
    found, left_out = [], []
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        left_out += [(here / name).relative_to(folder) for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".") and not (here / name).is_symlink()]
        for name in files:
            path = (here / name).relative_to(folder)
            if name.startswith(".") or (here == folder and name in _NOT_SIDE_FILES):
                continue
            if not (here / name).exists():
                raise ValueError(f"{here / name} is a link to {os.readlink(here / name)}, which is not there: mend it")
            if path.suffix in _WEIGHT_SUFFIXES:
                if here != folder or path.suffix != ".safetensors":
                    left_out.append(path)
                continue
            found.append(path.as_posix())
    if left_out:
        log.warning("%s: not copied: %s", folder, ", ".join(sorted(map(str, left_out))))
    return sorted(found)


def write_side_files(folder: Path, names: Iterable[str], out: Path, texts: Mapping[str, str | None]) -> None:
    """Copy what `side_files` has found, but for `texts`: other content by file name, None for a file to leave out."""
    for name in names:
        if name not in texts:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)
    for name, text in texts.items():
        if text is not None:
            (out / name).write_text(text)
