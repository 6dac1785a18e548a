"""Conversion both ways, streamed: Hugging Face folder <-> megatron-core distributed checkpoint.

The output appears under its name only when it is complete; an interrupted conversion leaves `<name>.partial` and goes
on from there when it is started again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_r1reward.checkpoint.manifest import write_manifest
from megatron_r1reward.checkpoint.streaming import JOURNAL, Job, Sources, check_tie, run_jobs
from megatron_r1reward.conversion.torch_dist_folder import Chunk, aligned, archive, megatron_shape, write_index
from megatron_r1reward.conversion.weight_source import TEMPLATE, HfTensor, WeightSource
from megatron_r1reward.files import exclusive, publish_folder
from megatron_r1reward.model_folder import safetensors_layout as st
from megatron_r1reward.model_folder.dtypes import check_dtype, config_for
from megatron_r1reward.types import TensorMeta

_FILE_BYTES = 2 << 30  # of one file of an imported checkpoint: enough files for parallel reading


@dataclass(frozen=True, kw_only=True)
class ConversionSummary:
    """What a conversion did, or would do (`dry_run`)."""

    tensors: int  # on the output side
    bytes: int
    files: int


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """The folder that a conversion to `out` works in; no other process works in it meanwhile.

    Raises:
        ValueError: `out` exists, or another conversion is writing it.
    """
    if out.exists():
        raise ValueError(f"{out} exists: choose another name or remove it first")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(out.with_name(f".{out.name}.lock")):
            yield out.with_name(out.name + ".partial")
    except BlockingIOError:
        raise ValueError(f"another conversion is writing {out}: choose another name, or wait for it") from None


def _publish(staging: Path, out: Path) -> None:
    (staging / JOURNAL).unlink()
    if out.exists():  # whatever came there meanwhile is not ours to replace
        raise ValueError(f"{out} appeared while it was written: remove it and start again, {staging} is complete")
    publish_folder(staging, out)


def default_threads() -> int:
    return min(8, os.cpu_count() or 1)


def import_folder(
    folder: Path,
    out: Path,
    *,
    dtype: str | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> ConversionSummary:
    """Hugging Face folder -> distributed checkpoint that loads under any TP, PP, VPP, EP and DP.

    Args:
        dtype: of all weights, e.g. "bfloat16"; None keeps each tensor's own.
        threads: files written at a time; None: one per core, at most 8.
        dry_run: check names, shapes and sizes and write nothing; `config.json` alone is enough.

    Raises:
        ValueError: a name is missing or unknown, the tied head differs from the embedding, `out` exists, or the disk
            is too small.
    """
    sources = Sources()
    if dtype is not None:
        check_dtype(dtype)
    source = WeightSource(folder, sources, without_values=dry_run)
    if source.is_distributed:
        raise ValueError(f"{folder} is a distributed checkpoint already: use export")
    if source.shape.quantized is not None:
        raise ValueError(
            f"{folder} holds weights quantized by {source.shape.quantized!r}, which are for serving: import the folder "
            "that they were made from"
        )
    chunks, jobs = _import_jobs(source, dtype)
    summary = ConversionSummary(
        tensors=len(jobs), bytes=sum(job.length for job in jobs), files=len({job.file for job in jobs})
    )
    if dry_run:
        return summary
    _check_tie(source)
    fingerprint = {"import": source.description(), "dtype": dtype}
    with _staging(out) as staging:
        written = run_jobs(
            staging, jobs, sources, threads=threads or default_threads(), fingerprint=fingerprint, progress=progress
        )
        source.template.save(staging / TEMPLATE)
        write_index(staging, chunks, {"source": folder.name})
        write_manifest(staging, written, kind="weights", exclude=(JOURNAL,))
        _publish(staging, out)
    sources.close()
    return summary


def _check_tie(source: WeightSource) -> None:
    """A folder with tied embeddings may hold the head a second time; it must then be the embedding."""
    tie = source.table.tie
    if tie is None or tie.hf not in source.on_disk:
        return
    embedding = source.table.by_megatron[tie.to].hf[0]
    (head,), (tied,) = (list(source.tensor(source.on_disk[name]).views()) for name in (tie.hf, embedding))
    check_tie(source.folder, tie.hf, head, embedding, tied)


def _import_jobs(source: WeightSource, dtype: str | None) -> tuple[list[Chunk], list[Job]]:
    chunks: list[Chunk] = []
    jobs: list[Job] = []
    number, position = 0, 0
    for entry in source.table:
        parts = [source.meta(name) for name in entry.hf]
        target = getattr(torch, dtype) if dtype else parts[0].dtype
        if any(part.dtype != parts[0].dtype for part in parts) and dtype is None:
            names = ", ".join(f"{name} {part.dtype}" for name, part in zip(entry.hf, parts, strict=True))
            raise ValueError(f"{source.folder}: {names} become one parameter: choose one dtype with --dtype")
        shape = megatron_shape(entry)
        key = source.table.checkpoint_key(entry)
        wrapper = archive(target, (*(1 for _ in key.index), *shape))
        length = wrapper.length(torch.Size(shape).numel() * target.itemsize)
        if position and position + length > _FILE_BYTES:
            number, position = number + 1, 0
        file = f"__0_{number}.distcp"
        chunks.append(Chunk(key=key, shape=shape, dtype=target, file=file, offset=position, length=length))
        jobs.append(
            Job(
                name=entry.megatron,
                file=file,
                offset=position,
                length=length,
                prefix=wrapper.prefix,
                suffix=wrapper.suffix,
                dtype=target,
                views=lambda entry=entry: entry.layout.merge_views(source.megatron_parts(entry)),  # type: ignore[misc]
            )
        )
        position = aligned(position + length)
    return chunks, jobs


def export_folder(
    folder: Path,
    out: Path,
    *,
    template: Path | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    progress: bool = True,
    critic: bool = False,
) -> ConversionSummary:
    """Distributed checkpoint (imported, or saved by training) -> Hugging Face folder.

    The files have the names, order, headers and dtypes of the original folder, so an untrained import comes back
    byte for byte.

    Args:
        template: the original folder; None: what the import kept, or the run's `model.path`.
        dtype: of all weights; None: the original tensors' own. `config.json` names it.
        critic: the critic that a training checkpoint holds, in the place of its policy.

    Raises:
        ValueError: the checkpoint is damaged or of another model, `out` exists, or the disk is too small.
    """
    sources = Sources()
    if dtype is not None:
        check_dtype(dtype)
    source = WeightSource(folder, sources, template=template, critic=critic)
    if not source.is_distributed:
        raise ValueError(f"{folder} is a Hugging Face folder already: use import, merge or export --fp8")
    original = {t.meta.name: t.meta.dtype for f in source.template.weights.files for t in f.tensors}
    # Rotary buffers of the original folder follow from config.json; no checkpoint holds them.
    original = {name: kept for name, kept in original.items() if name not in source.template.weights.extra}
    tensors = {name: source.tensor(name) for name in original}
    wanted = {name: replace(tensor.meta, dtype=dtype or original[name]) for name, tensor in tensors.items()}
    summary = write_hf_folder(
        out,
        source,
        {name: HfTensor(meta=meta, views=tensors[name].views) for name, meta in wanted.items()},
        sources=sources,
        options={"export": source.description(), "dtype": dtype, "critic": critic},
        threads=threads or default_threads(),
        dry_run=dry_run,
        progress=progress,
    )
    sources.close()
    return summary


def write_hf_folder(
    out: Path,
    source: WeightSource,
    tensors: dict[str, HfTensor],
    *,
    sources: Sources,
    options: dict[str, Any],
    threads: int,
    dry_run: bool,
    progress: bool,
    extra_files: dict[str, str] | None = None,
) -> ConversionSummary:
    """Write `tensors` in the files of the source's template; names it does not have follow their file's others.

    `extra_files` replace or add texts, e.g. a changed config.json.
    """
    files = _output_files(source, [t.meta for t in tensors.values()])
    jobs = [
        Job(
            name=place.meta.name,
            file=file.name,
            offset=place.offset if number else 0,
            length=place.length + (0 if number else file.data_start),
            prefix=b"" if number else file.header_bytes(),
            views=tensors[place.meta.name].views,
            dtype=place.meta.torch_dtype,
        )
        for file in files
        for number, place in enumerate(file.tensors)
    ]
    summary = ConversionSummary(tensors=len(jobs), bytes=sum(job.length for job in jobs), files=len(files))
    if dry_run:
        return summary
    template = source.template
    config = config_for(template.config(), {t.meta.dtype for f in files for t in f.tensors})
    texts: dict[str, str | None] = {"config.json": config}
    if template.weights.index is not None:
        unchanged = tuple(files) == template.weights.files
        texts[st.INDEX] = template.weights.index if unchanged else st.index_text(files)
    with _staging(out) as staging:
        run_jobs(staging, jobs, sources, threads=threads, fingerprint=options, progress=progress)
        texts |= {**source.said_by_training(), **(extra_files or {})}
        st.write_side_files(template.folder, template.side_files, staging, texts)
        _publish(staging, out)
    return summary


def _output_files(source: WeightSource, metas: Sequence[TensorMeta]) -> list[st.SafetensorsFile]:
    """The template's files where nothing about a tensor changes, else new headers for the same grouping."""
    by_name = {meta.name: meta for meta in metas}
    files = []
    for original in source.template.weights.files:
        names = [t.meta.name for t in original.tensors]
        added = [meta for meta in metas if meta.name not in source.on_disk.values() and _belongs(meta.name, names)]
        wanted = [by_name[name] for name in names if name in by_name] + added
        if wanted == [t.meta for t in original.tensors]:
            files.append(original)
        else:
            files.append(st.build_file(original.name, wanted))
    return files


def _belongs(name: str, names: Sequence[str]) -> bool:
    """`layer.weight_scale` goes where `layer.weight` is."""
    return name.rpartition(".")[0] + ".weight" in names
