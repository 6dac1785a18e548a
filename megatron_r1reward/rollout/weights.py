"""What a weight push consists of: tensors with names, cut into buckets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

DEFAULT_BUCKET_BYTES = 64 << 20


class WeightPushError(RuntimeError):
    """A push did not complete. Servers that may hold a mixture of old and new weights stay paused."""


@dataclass(frozen=True, kw_only=True)
class TensorMeta:
    """What the wire needs to know about a tensor before it comes."""

    name: str  # Hugging Face checkpoint name
    dtype: str  # torch's name without the prefix, e.g. "bfloat16"
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> TensorMeta:
        return cls(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"tensor {self.name}: {self.dtype!r} is not a torch dtype; send e.g. 'bfloat16'")
        return dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.numel * self.torch_dtype.itemsize


def bucketize(metas: Iterable[TensorMeta], limit_bytes: int = DEFAULT_BUCKET_BYTES) -> Iterator[tuple[TensorMeta, ...]]:
    """Cut `metas`, in order, into runs of one dtype that hold at most `limit_bytes`.

    Both ends call this on the same list and so agree on the messages. A tensor above the limit travels alone.
    """
    bucket: list[TensorMeta] = []
    size = 0
    for meta in metas:
        if bucket and (size + meta.num_bytes > limit_bytes or meta.dtype != bucket[0].dtype):
            yield tuple(bucket)
            bucket, size = [], 0
        bucket.append(meta)
        size += meta.num_bytes
    if bucket:
        yield tuple(bucket)
