"""The weights of one push as buckets: taken from the trainer once, kept on the host to be sent again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch

from megatron_r1reward.types import TensorMeta
from megatron_r1reward.weight_sync.buckets import Bucket, Packer, WeightUpdate
from megatron_r1reward.weight_sync.shared_memory import MemoryFile


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
        return torch.cat(self._packer.sums) if self._packer.sums else torch.empty(0, dtype=torch.int64)

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
                    host.copy_(flat)
                yield bucket, flat
            self._packer.finish()
        except GeneratorExit:
            raise
        except BaseException as error:
            self.error = error
            raise
        if self._snapshot is not None:
            self._snapshot.keep(self._version, self.sums())
