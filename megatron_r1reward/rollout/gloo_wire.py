"""The gloo transport as both ends see it: messages, rendezvous and broadcast. No vLLM and no Megatron in here."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1reward.rollout.weights import bucketize
from megatron_r1reward.types import TensorMeta

SENDER_RANK = 0


@dataclass(frozen=True, kw_only=True)
class GlooRendezvous:
    """Where a server's workers meet the sender: the body of /init_weight_transfer_engine."""

    host: str  # the sender's address
    port: int
    rank_offset: int  # rank of this server's first worker
    world_size: int  # the sender and all workers of all servers
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class GlooUpdate:
    """What is about to be broadcast: the body of /update_weights."""

    tensors: Sequence[Sequence[Any]]  # (name, dtype, shape) of every tensor, in order
    bucket_bytes: int

    @classmethod
    def of(cls, metas: Sequence[TensorMeta], bucket_bytes: int) -> GlooUpdate:
        return cls(tensors=[(m.name, m.dtype, list(m.shape)) for m in metas], bucket_bytes=bucket_bytes)

    def buckets(self) -> Iterator[tuple[TensorMeta, ...]]:
        metas = (TensorMeta(name=name, dtype=dtype, shape=tuple(shape)) for name, dtype, shape in self.tensors)
        return bucketize(metas, self.bucket_bytes)


class GlooGroup:
    """A gloo process group of its own, apart from torch.distributed's default group."""

    def __init__(self, store: dist.TCPStore, meeting: GlooRendezvous, rank: int) -> None:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # absent from torch's stubs
        options._timeout = timedelta(seconds=meeting.timeout_s)
        # When everybody meets on the loopback address, nobody listens on any other.
        device = dist.ProcessGroupGloo.create_device(hostname=meeting.host if is_loopback(meeting.host) else "")
        options._devices = [device]
        self._store = store  # must live as long as the group
        self._group = dist.ProcessGroupGloo(store, rank, meeting.world_size, options)

    @classmethod
    def join(cls, meeting: GlooRendezvous, rank: int) -> GlooGroup:
        """Join as a worker; blocks until all ranks are there or the timeout has passed."""
        timeout = timedelta(seconds=meeting.timeout_s)
        store = dist.TCPStore(meeting.host, meeting.port, is_master=False, timeout=timeout)
        return cls(store, meeting, rank)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send (rank 0) or receive (the others) a contiguous CPU tensor."""
        options = dist.BroadcastOptions()
        options.rootRank = SENDER_RANK
        options.rootTensor = 0
        self._group.broadcast([tensor], options).wait()  # type: ignore[attr-defined]  # absent from torch's stubs

    def close(self) -> None:
        """Close the connections; a peer that waits for data gets an error."""
        self._group.abort()


def listen(host: str, timeout_s: float) -> dist.TCPStore:
    """The sender's store, on a port that the kernel picks (`store.port`)."""
    return dist.TCPStore(host, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, not an address
        return host == "localhost"
