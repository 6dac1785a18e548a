"""Copying tensors from files to files without holding a model: at most one buffer per thread, whatever the size.

Source files are mapped, never read as a whole. A tensor of a mapping costs nothing until its values are used; views of
it (slices, chunks) are copied as byte ranges, and only a change of dtype or a transposition builds values in memory.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from tqdm import tqdm

JOURNAL = "conversion.jsonl"
_BUFFER_BYTES = 8 << 20
_CONVERT_BYTES = 32 << 20  # values built in memory at a time when a dtype or an order changes
_FLUSH_BYTES = 512 << 20  # written pages handed to the disk at a time, so that the final wait is short


class MappedFile:
    """A file whose ranges are tensors. `range_of` tells where the bytes of a contiguous view lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self.descriptor).st_size
        if not self._size:
            os.close(self.descriptor)
            raise ValueError(f"{path} is empty: copy it again")
        mapping = mmap.mmap(self.descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)

    @property
    def storage_address(self) -> int:
        return self._bytes.untyped_storage().data_ptr()

    def tensor(self, offset: int, length: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor at `offset`; a view of the mapping where its address allows that, else a copy.

        Raises:
            ValueError: the file ends before the tensor.
        """
        if offset + length > self._size:
            raise ValueError(f"{self.path} ends at {self._size}, a tensor needs bytes up to {offset + length}")
        if not length:
            return torch.empty(shape, dtype=dtype)
        raw = self._bytes[offset : offset + length]
        if offset % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).reshape(shape)

    def range_of(self, view: torch.Tensor) -> tuple[int, int]:
        return view.data_ptr() - self.storage_address, view.numel() * view.element_size()

    def close(self) -> None:
        os.close(self.descriptor)


class Sources:
    """The files that a conversion reads, mapped when first used."""

    def __init__(self) -> None:
        self._files: dict[Path, MappedFile] = {}
        self._by_address: dict[int, MappedFile] = {}
        self._lock = threading.Lock()

    def open(self, path: Path) -> MappedFile:
        with self._lock:
            if path not in self._files:
                file = MappedFile(path)
                self._files[path] = file
                self._by_address[file.storage_address] = file
            return self._files[path]

    def pieces(self, view: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[MappedFile, int, int] | torch.Tensor]:
        """The bytes of `view` as `dtype`, in order: ranges of mapped files where they lie there, else small tensors."""
        mapped = self._by_address.get(view.untyped_storage().data_ptr()) if view.numel() else None
        if view.dtype == dtype and view.is_contiguous():
            if mapped is None:
                yield view
            else:
                yield (mapped, *mapped.range_of(view))
            return
        rows = max(1, _CONVERT_BYTES // max(1, view[0].numel() * 4)) if view.ndim else 1
        for part in view.split(rows) if view.ndim else (view,):
            yield part.to(dtype).contiguous()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One tensor of an output file: `prefix`, the concatenated `views` as `dtype`, `suffix`, at `offset`."""

    name: str
    file: str
    offset: int
    length: int  # of everything
    views: Callable[[], Iterable[torch.Tensor]]
    dtype: torch.dtype
    prefix: bytes = b""
    suffix: bytes = b""


@dataclass(frozen=True, kw_only=True)
class WrittenItem:
    """A job's bytes in the output, as the manifest records them."""

    name: str
    offset: int
    length: int
    hash: str


def check_finite(values: torch.Tensor, what: str) -> None:
    """ValueError where weights hold NaN or infinities, e.g. because they do not fit into their dtype."""
    if values.is_floating_point() and not torch.isfinite(values.float()).all():
        name, largest = str(values.dtype).removeprefix("torch."), torch.finfo(values.dtype).max
        raise ValueError(f"{what} is not finite as {name}: it holds NaN, infinity or values beyond {largest:g}")


def check_tie(folder: Path, head_name: str, head: torch.Tensor, embedding_name: str, embedding: torch.Tensor) -> None:
    """ValueError where a folder with tied embeddings holds the head a second time, and it is another one."""
    rows = zip(head.split(1024), embedding.split(1024), strict=False)
    if head.shape != embedding.shape or not all(torch.equal(a, b) for a, b in rows):
        raise ValueError(
            f"{folder}: config.json ties the embeddings, but {head_name} differs from {embedding_name}: "
            "set tie_word_embeddings to false, or remove the tensor"
        )


class _Writer:
    """Gathers pieces in one buffer; hashes and writes it whenever it is full. Without a descriptor it only hashes."""

    def __init__(
        self, descriptor: int | None, sources: Sources, buffer: memoryview, advance: Callable[[int], None]
    ) -> None:
        self._descriptor, self._sources, self._buffer, self._advance = descriptor, sources, buffer, advance
        self._unflushed = 0

    def write(self, job: Job) -> WrittenItem:
        self._position, self._filled, self._hash = job.offset, 0, xxhash.xxh3_128()
        self._bytes(memoryview(job.prefix))
        for view in job.views():
            for piece in self._sources.pieces(view, job.dtype):
                if isinstance(piece, torch.Tensor):
                    check_finite(piece, f"tensor {job.name}")
                    self._bytes(memoryview(piece.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
                else:
                    self._range(*piece)
        self._bytes(memoryview(job.suffix))
        self._flush()
        assert self._position == job.offset + job.length, f"{job.name}: {self._position - job.offset} != {job.length}"
        return WrittenItem(name=job.name, offset=job.offset, length=job.length, hash=self._hash.hexdigest())

    def _range(self, file: MappedFile, offset: int, length: int) -> None:
        while length:
            space = self._buffer[self._filled : self._filled + length]
            got = os.preadv(file.descriptor, [space], offset)
            if not got:
                raise ValueError(f"{file.path} became shorter while it was read")
            self._filled, offset, length = self._filled + got, offset + got, length - got
            if self._filled == len(self._buffer):
                self._flush()

    def _bytes(self, data: memoryview) -> None:
        while data:
            size = min(len(data), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + size] = data[:size]
            self._filled, data = self._filled + size, data[size:]
            if self._filled == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        content = self._buffer[: self._filled]
        self._hash.update(content)
        if self._descriptor is None:
            self._position, content = self._position + self._filled, content[:0]
        while content:
            assert self._descriptor is not None
            written = os.pwrite(self._descriptor, content, self._position)
            self._position, content = self._position + written, content[written:]
        self._advance(self._filled)
        self._unflushed, self._filled = self._unflushed + self._filled, 0
        if self._unflushed >= _FLUSH_BYTES and self._descriptor is not None:
            os.fdatasync(self._descriptor)
            self._unflushed = 0


def hash_tensor(
    name: str, length: int, views: Callable[[], Iterable[torch.Tensor]], dtype: torch.dtype, sources: Sources
) -> str:
    """xxh3-128 of a tensor's bytes as `dtype`, read piece by piece."""
    job = Job(name=name, file="", offset=0, length=length, views=views, dtype=dtype)
    return _Writer(None, sources, memoryview(bytearray(_BUFFER_BYTES)), lambda _: None).write(job).hash


def run_jobs(
    staging: Path, jobs: Sequence[Job], sources: Sources, *, threads: int, fingerprint: dict[str, Any], progress: bool
) -> dict[str, list[WrittenItem]]:
    """Write every job's file under `staging`, one thread per file; returns what each file holds.

    Files that a journal of an earlier, interrupted call with the same `fingerprint` names as finished are kept.

    Raises:
        ValueError: the disk has not enough space, or a source is damaged.
    """
    by_file: dict[str, list[Job]] = {}
    for job in jobs:
        by_file.setdefault(job.file, []).append(job)
    done = _start_journal(staging, fingerprint)
    todo = {name: file for name, file in by_file.items() if name not in done}
    needed = sum(job.length for file in todo.values() for job in file)
    free = shutil.disk_usage(staging).free + sum(p.stat().st_size for n in todo if (p := staging / n).exists())
    if needed > free:
        raise ValueError(f"{staging} needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")
    lock = threading.Lock()
    bar = tqdm(total=needed, unit="B", unit_scale=True, desc="convert", disable=not progress, dynamic_ncols=True)

    def advance(count: int) -> None:
        with lock:
            bar.update(count)

    def write_file(name: str) -> None:
        items = _write_file(staging / name, todo[name], sources, advance)
        with lock:
            done[name] = items
            _append(staging / JOURNAL, {"file": name, "items": [item.__dict__ for item in items]})

    with bar, ThreadPoolExecutor(max_workers=threads, thread_name_prefix="convert") as pool:
        largest_first = sorted(todo, key=lambda name: -sum(job.length for job in todo[name]))
        futures = [pool.submit(write_file, name) for name in largest_first]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: done[name] for name in by_file}


def _write_file(path: Path, jobs: list[Job], sources: Sources, advance: Callable[[int], None]) -> list[WrittenItem]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        writer = _Writer(descriptor, sources, memoryview(bytearray(_BUFFER_BYTES)), advance)
        items = [writer.write(job) for job in jobs]
        os.ftruncate(descriptor, max(job.offset + job.length for job in jobs))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return items


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as handle:
        handle.write(json.dumps(row) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def _start_journal(staging: Path, fingerprint: dict[str, Any]) -> dict[str, list[WrittenItem]]:
    """What an interrupted call with this fingerprint has finished; anything else in `staging` is removed."""
    lines = []
    if (staging / JOURNAL).is_file():
        for line in (staging / JOURNAL).read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:  # the line that was being written when the process ended
                break
    if lines and lines[0] == json.loads(json.dumps(fingerprint)):
        return {row["file"]: [WrittenItem(**item) for item in row["items"]] for row in lines[1:]}
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    _append(staging / JOURNAL, fingerprint)
    return {}
