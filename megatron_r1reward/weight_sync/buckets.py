"""The weights of one push as buckets: what both ends agree on (layout, checksums, messages), and the trainer's side,
which fills buckets once and keeps them on the host to be sent again. No vLLM and no Megatron in here.

    the exporter's tensors -> Recording -> flat buckets -> a transport;  WeightSnapshot keeps them for who missed them
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch

from megatron_r1reward.types import TensorMeta
from megatron_r1reward.weight_sync import WeightPushError
from megatron_r1reward.weight_sync.shared_memory import MemoryFile

DEFAULT_BUCKET_BYTES = 64 << 20
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
    """int64 [tensors in the bucket], on the bucket's device."""
    return torch.stack([checksum(slot) for slot in bucket.slots(flat)])


def verify(metas: Iterable[TensorMeta], expected: torch.Tensor, got: torch.Tensor) -> None:
    """Compare checksums, int64 [tensors] each, on any devices.

    Raises:
        WeightPushError: names the tensors that differ.
    """
    wrong = [meta.name for meta, same in zip(metas, (expected.cpu() == got.cpu()).tolist(), strict=True) if not same]
    if wrong:
        raise WeightPushError(f"{len(wrong)} tensors arrived damaged, the first: {', '.join(wrong[:3])}")


@dataclass
class Packer:
    """Fills buckets from a stream of tensors, which must come in the order that was announced.

    `sums` grows by the checksums of each bucket that has been filled, on the bucket's device.
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


class BucketSource(Protocol):
    """Where a transport gets filled buckets from."""

    memory: MemoryFile | None  # holds the buckets back to back, when there is one

    @property
    def update(self) -> WeightUpdate | None: ...

    def __iter__(self) -> Iterator[tuple[Bucket, torch.Tensor]]:
        """(bucket, uint8 [num_bytes]); the tensor is valid until the next but one is asked for."""
        ...

    def sums(self) -> torch.Tensor:
        """int64 [tensors so far]: checksums of the buckets that have been handed out."""
        ...


class WeightSnapshot:
    """Host memory for one version of the weights, reused by every push.

    `version` is None while it holds none, or a half-recorded one.
    """

    def __init__(self) -> None:
        self.memory: MemoryFile | None = None
        self.update: WeightUpdate | None = None
        self.version: int | None = None
        self._buckets: Sequence[Bucket] = ()
        self._sums = torch.empty(0, dtype=torch.int64)

    def record(
        self,
        metas: Sequence[TensorMeta],
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        version: int,
        bucket_bytes: int,
        device: torch.device,
    ) -> Recording:
        """Begin to take over new weights; they are in once the recording has been iterated to its end."""
        update = WeightUpdate.of(metas, bucket_bytes)
        self._buckets = update.buckets()
        size = sum(bucket.num_bytes for bucket in self._buckets)
        if self.memory is None or self.memory.tensor.numel() != size:
            self.close()
            self.memory = MemoryFile(max(size, 1))
            if device.type != "cpu":
                self.memory.pin()
        self.update, self.version = update, None
        return Recording(update, tensors, device=device, version=version, snapshot=self)

    def keep(self, version: int, sums: torch.Tensor) -> None:
        self._sums, self.version = sums, version

    def forget(self) -> None:
        """The weights turned out to be unfit for any server."""
        self.version = None

    def __iter__(self) -> Iterator[tuple[Bucket, torch.Tensor]]:
        assert self.version is not None and self.memory is not None, "nothing has been recorded"
        for bucket in self._buckets:
            yield bucket, self.memory.tensor[bucket.start : bucket.start + bucket.num_bytes]

    def sums(self) -> torch.Tensor:
        return self._sums

    def close(self) -> None:
        self.version = None
        if self.memory is not None:
            self.memory.close()
            self.memory = None


class Recording:
    """One pass over the trainer's tensors: packs them into buckets and, with a snapshot, keeps these.

    Gathering the tensors is collective in the trainer, so a pass that has begun must be ended: `drain` does that when
    the transport has failed.
    """

    def __init__(
        self,
        update: WeightUpdate,
        tensors: Iterable[tuple[str, torch.Tensor]],
        *,
        device: torch.device,
        version: int,
        snapshot: WeightSnapshot | None = None,
    ) -> None:
        self.update = update
        self.memory = None if snapshot is None else snapshot.memory
        self.error: BaseException | None = None  # of the trainer's tensors, not of a transport
        self._device = device
        self._version = version
        self._snapshot = snapshot
        self._packer = Packer(iter(tensors))
        self._pass = self._fill()

    def __iter__(self) -> Iterator[tuple[Bucket, torch.Tensor]]:
        return self._pass

    def sums(self) -> torch.Tensor:
        return torch.cat(self._packer.sums).cpu() if self._packer.sums else torch.empty(0, dtype=torch.int64)

    def drain(self) -> None:
        """Take the rest of the tensors: the other trainer ranks are not left alone, and the snapshot becomes whole."""
        for _ in self._pass:
            pass

    def _fill(self) -> Iterator[tuple[Bucket, torch.Tensor]]:
        try:
            for bucket in self.update.buckets():
                host = None if self.memory is None else self.memory.tensor[bucket.start :][: bucket.num_bytes]
                if host is not None and self._device.type == "cpu":
                    flat = host
                else:
                    flat = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._device)
                self._packer.fill(bucket, flat)
                if host is not None and flat is not host:
                    host.copy_(flat, non_blocking=True)  # beside its broadcast; complete before the snapshot is
                yield bucket, flat
            self._packer.finish()
            if self._device.type != "cpu":
                torch.cuda.current_stream(self._device).synchronize()
        except GeneratorExit:
            raise
        except BaseException as error:
            self.error = error
            raise
        if self._snapshot is not None:
            self._snapshot.keep(self._version, self.sums())
