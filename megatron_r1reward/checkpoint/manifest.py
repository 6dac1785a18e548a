"""The manifest of a checkpoint: sizes and content hashes of all it holds, written last.

A checkpoint whose manifest is missing or does not match does not exist. Hashes are per tensor, so that damage is
reported by the tensor's name: `files` covers `.distcp` files item by item and all others as a whole. xxh3-128 finds
damage, not malice; it runs at memory speed, which is why every load can afford it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import xxhash

from megatron_r1reward.checkpoint.streaming import WrittenItem
from megatron_r1reward.files import sync, write_text

MANIFEST = "manifest.json"
_BLOCK = 8 << 20


def hash_range(path: Path, offset: int, length: int) -> str:
    """xxh3-128 of a part of a file; a file that ends early gives another hash."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(_BLOCK, max(1, length))))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while length:
            got = os.preadv(descriptor, [buffer[:length]], offset)
            if not got:
                break
            digest.update(buffer[:got])
            offset, length = offset + got, length - got
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def plain_files(folder: Path, exclude: Iterable[str] = ()) -> list[str]:
    """Every file below `folder` that is hashed as a whole."""
    skip = {MANIFEST, *exclude}
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in skip and not name.endswith(".distcp"))


def write_manifest(
    folder: Path,
    items: Mapping[str, Sequence[WrittenItem]],
    *,
    kind: Literal["weights", "training"],
    exclude: Iterable[str] = (),
    **facts: Any,
) -> None:
    """Hash the files that are no tensors and write the manifest, durably. `items` covers the `.distcp` files."""
    plain = {}
    for name in plain_files(folder, exclude):
        path = folder / name
        sync(path)
        plain[name] = {"bytes": path.stat().st_size, "hash": hash_range(path, 0, path.stat().st_size)}
    tensors = {
        name: {"bytes": (folder / name).stat().st_size, "items": [asdict(item) for item in members]}
        for name, members in sorted(items.items())
    }
    manifest = {"format": 1, "kind": kind, "hash": "xxh3_128", **facts, "files": plain | tensors}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1), durable=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """ValueError when there is none, or it is torn."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{MANIFEST} is missing: the save did not finish")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if manifest["format"] != 1 or not isinstance(manifest["files"], dict):
            raise ValueError(f"{MANIFEST} has an unknown format")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({error})") from error
    return manifest


def find_damage(folder: Path, *, hashes: bool = True, threads: int = 2) -> Iterator[str]:
    """What is wrong with a checkpoint, one line per file or tensor; nothing when it is intact.

    `hashes=False` only looks at the presence and the sizes of the files.
    """
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        yield str(error)
        return
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}: it is truncated or overwritten"
    if not hashes:
        return

    def check(name: str) -> list[str]:
        path, entry = folder / name, manifest["files"][name]
        if not path.is_file():
            return []
        if "hash" in entry:
            same = hash_range(path, 0, entry["bytes"]) == entry["hash"]
            return [] if same else [f"{name} does not match its hash"]
        return [
            f"tensor {item['name']} in {name} does not match its hash"
            for item in entry["items"]
            if hash_range(path, item["offset"], item["length"]) != item["hash"]
        ]

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="verify") as pool:
        for lines in pool.map(check, manifest["files"]):
            yield from lines
