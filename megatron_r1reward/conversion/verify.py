"""Is a checkpoint what it should be? Hashes, names, shapes, tied weights, and every byte against another folder."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_r1reward.checkpoint.manifest import MANIFEST, find_damage
from megatron_r1reward.checkpoint.streaming import Sources, check_finite, hash_tensor
from megatron_r1reward.conversion.weight_source import WeightSource
from megatron_r1reward.model_folder.other_folder import is_distributed

_SLICE = 32 << 20  # values that are looked at at a time


def verify(
    folder: Path, *, against: Path | None = None, template: Path | None = None, threads: int = 2
) -> Iterator[str]:
    """One line per thing that is wrong; nothing when all is well.

    Args:
        folder: Hugging Face folder or distributed checkpoint. Names, shapes and values are checked against the model
            family, the files against the manifest where there is one, those beside the weights by reading them.
        against: a folder of either kind that must hold the same bytes under the same names (a round trip).
        template: the original Hugging Face folder of a training checkpoint; None: the run's `model.path`.
    """
    if is_distributed(folder) or (folder / MANIFEST).is_file():
        yield from find_damage(folder, threads=threads)
    sources = Sources()
    try:
        left = WeightSource(folder, sources, template=template)
        yield from _incomplete(left, threads)
        yield from _untied(left, sources)
        if against is not None:
            right = WeightSource(against, sources, template=template if against != folder else None)
            yield from _differences(left, right, sources, threads)
    except ValueError as error:
        yield str(error)
    finally:
        sources.close()


def _incomplete(source: WeightSource, threads: int) -> Iterator[str]:
    """Parameters that cannot be read, have another shape than the family says, or are not finite."""

    def check(name: str) -> str | None:
        tensor = source.tensor(source.on_disk[name])
        numel = 0
        try:
            for view in tensor.views():
                numel += view.numel()
                for part in view.reshape(-1).split(_SLICE):
                    check_finite(part, f"tensor {source.on_disk[name]}")
        except ValueError as error:
            text = str(error)
            return text if text.startswith("tensor ") else f"tensor {source.on_disk[name]}: {text}"
        if numel != tensor.meta.numel:
            return f"tensor {name} has {numel} values, its shape {tensor.meta.shape} has {tensor.meta.numel}"
        return None

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="verify") as pool:
        yield from (line for line in pool.map(check, source.on_disk) if line is not None)


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
