"""Is a checkpoint what it should be? Hashes, names, shapes, tied weights, and every byte against another folder."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_r1reward.checkpoint.manifest import MANIFEST, find_damage
from megatron_r1reward.checkpoint.streaming import Sources, hash_tensor
from megatron_r1reward.conversion.weight_source import FORMAT_FILE, WeightSource


def verify(
    folder: Path, *, against: Path | None = None, template: Path | None = None, threads: int = 2
) -> Iterator[str]:
    """One line per thing that is wrong; nothing when all is well.

    Args:
        folder: Hugging Face folder or distributed checkpoint. Names and shapes are checked against the model family,
            the files against the manifest where there is one.
        against: a folder of either kind that must hold the same bytes under the same names (a round trip).
        template: the original Hugging Face folder of a training checkpoint; None: the run's `model.path`.
    """
    if (folder / FORMAT_FILE).is_file() or (folder / MANIFEST).is_file():
        yield from find_damage(folder, threads=threads)
    sources = Sources()
    try:
        left = WeightSource(folder, sources, template=template)
        yield from _incomplete(left)
        yield from _untied(left, sources)
        if against is not None:
            right = WeightSource(against, sources, template=template if against != folder else None)
            yield from _differences(left, right, sources, threads)
    except ValueError as error:
        yield str(error)
    finally:
        sources.close()


def _incomplete(source: WeightSource) -> Iterator[str]:
    """Parameters that cannot be read or have another shape than the family says."""
    for name, on_disk in source.on_disk.items():
        try:
            tensor = source.tensor(on_disk)
            numel = sum(view.numel() for view in tensor.views())
        except ValueError as error:
            yield f"tensor {on_disk}: {error}"
            continue
        if numel != tensor.meta.numel:
            yield f"tensor {name} has {numel} values, its shape {tensor.meta.shape} has {tensor.meta.numel}"


def _content(source: WeightSource, name: str, sources: Sources) -> str:
    tensor = source.tensor(name)
    return hash_tensor(name, tensor.meta.num_bytes, tensor.views, tensor.meta.torch_dtype, sources)


def _untied(source: WeightSource, sources: Sources) -> Iterator[str]:
    tie = source.table.tie
    if tie is None or tie.hf not in source.on_disk or source.is_distributed:
        return
    embedding = source.table.by_megatron[tie.to].hf[0]
    head, tied = (_content(source, source.on_disk[name], sources) for name in (tie.hf, embedding))
    if head != tied:
        yield f"config.json ties the embeddings, but {source.on_disk[tie.hf]} differs from {source.on_disk[embedding]}"


def _differences(left: WeightSource, right: WeightSource, sources: Sources, threads: int) -> Iterator[str]:
    for name in sorted(set(left.on_disk) ^ set(right.on_disk)):
        yield f"tensor {name} is only in {(left if name in left.on_disk else right).folder}"

    def compare(name: str) -> str | None:
        a, b = left.tensor(left.on_disk[name]).meta, right.tensor(right.on_disk[name]).meta
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"tensor {name} is {a.dtype} {list(a.shape)} here and {b.dtype} {list(b.shape)} in {right.folder}"
        hashes = {_content(side, side.on_disk[name], sources) for side in (left, right)}
        return f"tensor {name} differs from the one in {right.folder}" if len(hashes) > 1 else None

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="verify") as pool:
        for line in pool.map(compare, [name for name in left.on_disk if name in right.on_disk]):
            if line is not None:
                yield line
