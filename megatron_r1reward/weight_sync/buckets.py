"""What both ends of a weight transfer agree on: layout, checksums, messages. No vLLM and no Megatron in here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch

from megatron_r1reward.types import TensorMeta
from megatron_r1reward.weight_sync.weights import WeightPushError, bucketize

_ALIGNMENT = 64  # bytes; lets every tensor be viewed as its dtype and as 64-bit words


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Tensors back to back, each at a multiple of `_ALIGNMENT`, in one flat uint8 buffer of `num_bytes`."""

    metas: tuple[TensorMeta, ...]
    offsets: tuple[int, ...]  # of each tensor in the bucket, bytes
    start: int  # of the bucket among all buckets, bytes
    num_bytes: int

    def slots(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """The padded uint8 slot of each tensor."""
        for meta, offset in zip(self.metas, self.offsets, strict=True):
            yield flat[offset : offset + _padded(meta.num_bytes)]

    def tensors(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, view with its dtype and shape) of each tensor."""
        for meta, slot in zip(self.metas, self.slots(flat), strict=True):
            yield meta.name, slot[: meta.num_bytes].view(meta.torch_dtype).view(meta.shape)


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """What is about to be sent: part of the body of /update_weights."""

    tensors: Sequence[Sequence[Any]]  # (name, dtype, shape) of every tensor, in order
    bucket_bytes: int

    @classmethod
    def of(cls, metas: Sequence[TensorMeta], bucket_bytes: int) -> WeightUpdate:
        return cls(tensors=[(m.name, m.dtype, list(m.shape)) for m in metas], bucket_bytes=bucket_bytes)

    def buckets(self) -> list[Bucket]:
        metas = (TensorMeta(name=name, dtype=dtype, shape=tuple(shape)) for name, dtype, shape in self.tensors)
        buckets: list[Bucket] = []
        start = 0
        for group in bucketize(metas, self.bucket_bytes):
            ends = list(accumulate(_padded(meta.num_bytes) for meta in group))
            bucket = Bucket(metas=group, offsets=(0, *ends[:-1]), start=start, num_bytes=ends[-1])
            buckets.append(bucket)
            start += bucket.num_bytes
        return buckets


@dataclass(frozen=True, kw_only=True)
class UpdateMessage:
    """The body of /update_weights for every transport; None for what the transport does not need."""

    update: Mapping[str, Any] | None = None  # WeightUpdate as a dictionary
    offset: int | None = None  # ipc: where the only bucket of `update` lies in the shared buffer, bytes
    checksums: Sequence[int] | None = None  # ipc: of its tensors
    last: bool = False  # nothing comes after it: every layer must be whole now
    abandon: bool = False  # give up the update that is under way


def checksum(slot: torch.Tensor) -> torch.Tensor:
    """Sum of the 64-bit words of one padded slot, modulo 2**64: int64 scalar on the slot's device.

    Finds lost, doubled and changed words at memory speed; not words that changed places within a tensor.
    """
    return slot.view(torch.int64).sum()


def checksums(bucket: Bucket, flat: torch.Tensor) -> torch.Tensor:
    """int64 [tensors in the bucket], on the CPU."""
    return torch.stack([checksum(slot) for slot in bucket.slots(flat)]).cpu()


def verify(metas: Iterable[TensorMeta], expected: torch.Tensor, got: torch.Tensor) -> None:
    """Compare checksums, int64 [tensors] each.

    Raises:
        WeightPushError: names the tensors that differ.
    """
    wrong = [meta.name for meta, same in zip(metas, (expected == got).tolist(), strict=True) if not same]
    if wrong:
        raise WeightPushError(f"{len(wrong)} tensors arrived damaged, the first: {', '.join(wrong[:3])}")


@dataclass
class Packer:
    """Fills buckets from a stream of tensors, which must come in the order that was announced.

    `sums` grows by the checksums of each bucket that has been filled.
    """

    stream: Iterator[tuple[str, torch.Tensor]]
    sums: list[torch.Tensor] = field(default_factory=list)

    def fill(self, bucket: Bucket, flat: torch.Tensor) -> None:
        """Copy the bucket's tensors from the stream into `flat` (uint8 [num_bytes], any device).

        Raises:
            WeightPushError: the stream is not what was announced.
        """
        for meta, (_, target), slot in zip(bucket.metas, bucket.tensors(flat), bucket.slots(flat), strict=True):
            name, tensor = next(self.stream, (None, None))
            if name is None or tensor is None:
                raise WeightPushError(f"the tensors end before {meta.name}, which the metadata announces")
            if TensorMeta.of(name, tensor) != meta:
                raise WeightPushError(f"announced {meta}, got {TensorMeta.of(name, tensor)}: same order, same shapes")
            target.copy_(tensor.detach())
            slot[meta.num_bytes :].zero_()
        self.sums.append(checksums(bucket, flat))

    def finish(self) -> None:
        """Raises WeightPushError when tensors are left over."""
        if (extra := next(self.stream, None)) is not None:
            raise WeightPushError(f"tensor {extra[0]} comes after the last one that the metadata announces")


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
