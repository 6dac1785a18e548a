"""What a weight push consists of: tensors with names, cut into buckets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron_r1reward.types import TensorMeta

DEFAULT_BUCKET_BYTES = 64 << 20


class WeightPushError(RuntimeError):
    """A push did not complete. Servers that may hold a mixture of old and new weights stay paused."""


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
