"""New weights from several checkpoints: a weighted mean, computed in float32, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_r1reward.checkpoint.streaming import Sources
from megatron_r1reward.conversion.convert import ConversionSummary, default_threads, write_hf_folder
from megatron_r1reward.conversion.weight_source import HfTensor, WeightSource

_SLICE = 8 << 20  # values


def merge_folders(
    folders: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    template: Path | None = None,
    threads: int | None = None,
) -> ConversionSummary:
    """sum_i w_i * folder_i as a Hugging Face folder in the first one's files and dtypes.

    Args:
        folders: Hugging Face folders or distributed checkpoints of one model.
        weights: they must add up to 1; None: the mean.
        template: the original Hugging Face folder of training checkpoints; None: the run's `model.path`.

    Raises:
        ValueError: the folders do not hold the same tensors, or the weights do not add up.
    """
    shares = [1 / len(folders)] * len(folders) if weights is None else list(weights)
    if len(shares) != len(folders) or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
        raise ValueError(f"{len(folders)} folders need as many weights that add up to 1, got {shares}")
    sources = Sources()
    members = [WeightSource(folder, sources, template=template) for folder in folders]
    first = members[0]
    for member in members:
        if member.shape.quantized is not None:
            raise ValueError(f"{member.folder} is quantized by {member.shape.quantized!r}: merge what it was made from")
    tensors = {}
    for name, on_disk in first.on_disk.items():
        parts = []
        for member in members:
            if name not in member.on_disk:
                raise ValueError(f"{member.folder} has no tensor {name}, which {first.folder} has")
            parts.append(member.tensor(member.on_disk[name]))
            if parts[-1].meta.shape != parts[0].meta.shape:
                raise ValueError(f"tensor {name} has {parts[-1].meta.shape} in {member.folder}, {parts[0].meta.shape}")
        tensors[on_disk] = HfTensor(meta=parts[0].meta, views=lambda parts=parts: _mean(parts, shares))  # type: ignore[misc]
    options = {"merge": [member.description() for member in members], "weights": shares}
    summary = write_hf_folder(
        out,
        first,
        tensors,
        sources=sources,
        options=options,
        threads=threads or default_threads(),
        dry_run=False,
        progress=True,
    )
    sources.close()
    return summary


def _mean(parts: Sequence[HfTensor], shares: Sequence[float]) -> Iterator[torch.Tensor]:
    flat = [_flat(part) for part in parts]
    for start in range(0, max(1, flat[0].numel()), _SLICE):
        pieces = (x[start : start + _SLICE].float() * share for x, share in zip(flat, shares, strict=True))
        yield sum(pieces, start=torch.zeros(())).to(flat[0].dtype)


def _flat(part: HfTensor) -> torch.Tensor:
    views = [view.reshape(-1) for view in part.views()]
    return views[0] if len(views) == 1 else torch.cat(views)
