"""Hugging Face folders at the level of bytes: where every tensor lies, and how to write a folder that equals another.

The safetensors format: 8 bytes header length (little endian), a JSON header, then the tensors' bytes back to back.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_r1reward.types import TensorMeta

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100 << 20  # the format's own limit

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
DTYPE_CODES = {ours: code for code, ours in DTYPES.items()}
# Everything of a folder that is not weights: configuration, tokenizer, processor, custom code, documentation.
_SIDE_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "*.md", "LICENSE*", "NOTICE*")
_NOT_SIDE_FILES = frozenset({INDEX, "trainer_state.json", "manifest.json"})


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
        if length > _MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file")
        raw = handle.read(length)
    try:
        parsed = parse_header(path.name, raw.decode())
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: the safetensors header is damaged ({error})") from error
    if path.stat().st_size != parsed.size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its header says {parsed.size}: download it again")
    return parsed


def build_file(name: str, metas: list[TensorMeta], metadata: Mapping[str, str] | None = None) -> SafetensorsFile:
    """The layout of a new file that holds `metas` in this order."""
    tree: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
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
    """The safetensors files of a checkpoint folder, in order of their names.

    Raises:
        ValueError: there are none, or one that the index names is missing or damaged, or a tensor occurs twice.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        names, weight_map = [SINGLE], None
    else:
        raise ValueError(f"{folder} holds no {SINGLE} and no {INDEX}: convert the weights to safetensors")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing, but {INDEX} names it")
    files = [read_file(folder / name) for name in names]
    places = {t.meta.name: t.file for f in files for t in f.tensors}
    if len(places) != sum(len(f.tensors) for f in files):
        raise ValueError(f"{folder}: a tensor occurs in two files")
    for name in weight_map or ():
        if places.get(name) != weight_map[name]:
            raise ValueError(f"{folder}: {INDEX} says that {name} is in {weight_map[name]}, which does not hold it")
    return files


def index_text(files: list[SafetensorsFile]) -> str:
    total = sum(t.length for f in files for t in f.tensors)
    weight_map = {t.meta.name: f.name for f in files for t in f.tensors}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )


def side_files(folder: Path) -> list[Path]:
    """The files of a folder that travel with its weights."""
    found = {path for pattern in _SIDE_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name not in _NOT_SIDE_FILES)
