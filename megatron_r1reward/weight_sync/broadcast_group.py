"""A broadcast group of the trainer and all workers of all servers: over TCP (gloo) or between GPUs (nccl).

Without GPUs there is one copy of the weights per machine: workers on one machine, of one server or of several, would
each pull the same bytes through the network and keep them. The first of them receives instead, into a memory file, and
says in the sender's store which buckets have come. Who waits there is set free when the sender leaves, since the store
leaves with it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_r1reward.network.tokens import is_loopback
from megatron_r1reward.weight_sync.buckets import Bucket
from megatron_r1reward.weight_sync.shared_memory import MemoryFile, open_memory_file

SENDER_RANK = 0
ADVICE = "or turn rollout.weights_once_per_host off: then every worker receives for itself"
WATCHDOG_FACTOR = 4  # torch's watchdog ends the process: we give up long before
_POLL_S = 0.0005
_CLOSED = "the broadcast group is closed"


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where a server's workers meet the sender: the body of /init_weight_transfer_engine."""

    backend: Literal["gloo", "nccl"]
    host: str  # the sender's address
    port: int
    rank_offset: int  # rank of this server's first worker
    world_size: int  # the sender and all workers of all servers
    timeout_s: float
    once_per_host: bool = False  # workers on one machine: one receives for all of them

    def store(self) -> dist.TCPStore:
        """A worker's way to the sender's store; blocks until it is there or the timeout has passed."""
        timeout = timedelta(seconds=self.timeout_s)
        return dist.TCPStore(self.host, self.port, is_master=False, timeout=timeout)


class BroadcastGroup:
    """A process group of its own, apart from torch.distributed's default group.

    On a GPU broadcasts have a stream of their own: on the default stream the packing of the next bucket would stand
    behind the broadcast of this one, and the host behind both. The host asks whether a broadcast is done instead of
    waiting in CUDA, so that a peer that is gone, or `close`, ends the wait; torch's own watchdog would end the process.
    """

    def __init__(self, store: dist.Store, meeting: Rendezvous, rank: int) -> None:
        timeout = timedelta(seconds=meeting.timeout_s)
        self._store: dist.Store | None = store  # must live as long as the group
        self._timeout_s = meeting.timeout_s
        self._stream: Any = None
        self._group: Any
        if meeting.backend == "gloo":
            self._group = _gloo_group(store, meeting, rank, timeout)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = WATCHDOG_FACTOR * timeout
            self._group = dist.ProcessGroupNCCL(store, rank, meeting.world_size, options)

    @classmethod
    def join(cls, meeting: Rendezvous, rank: int) -> BroadcastGroup:
        """Join as a worker; blocks until all ranks are there or the timeout has passed."""
        return cls(meeting.store(), meeting, rank)

    def broadcast(self, tensor: torch.Tensor, ready: Any = None) -> None:
        """Send (rank 0) or receive (the others) a contiguous tensor: on the CPU with gloo, on the GPU with nccl.

        Returns when `tensor` may be changed (sender) or read (receivers).

        Args:
            ready: of `filled`, when another thread has filled the tensor.
        """
        group = self._group
        if group is None:
            raise RuntimeError(_CLOSED)
        options = dist.BroadcastOptions()
        options.rootRank = SENDER_RANK
        options.rootTensor = 0
        if not tensor.is_cuda:
            group.broadcast([tensor], options).wait()
            return
        with torch.cuda.device(tensor.device):
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_event(ready or filled(tensor))
            with torch.cuda.stream(self._stream):
                group.broadcast([tensor], options).wait()  # orders the stream only
                done = self._stream.record_event()
        tensor.record_stream(self._stream)
        self._wait(done.query)

    def _wait(self, is_done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not is_done():
            if self._group is None:
                raise RuntimeError(_CLOSED)
            if time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"a peer has not answered within {self._timeout_s:g} s")
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Close the connections; a peer that waits for data gets an error. Safe to call twice."""
        group, self._group = self._group, None  # gloo closes them when the group is gone
        if group is not None:
            group.abort()
        self._store = None  # the sender's goes with it, and sets free who waits there


def filled(tensor: torch.Tensor) -> Any:
    """What a broadcast of `tensor` has to wait for: all that this thread has asked of its GPU. None on a CPU."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None


def _gloo_group(store: dist.Store, meeting: Rendezvous, rank: int, timeout: timedelta) -> Any:
    if not is_loopback(meeting.host):
        # Torch finds the device: that of GLOO_SOCKET_IFNAME, else the one that this host's name leads to.
        return dist.ProcessGroupGloo(store, rank, meeting.world_size, timeout)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # absent from torch's stubs
    # When everybody meets on the loopback address, nobody listens on any other.
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=meeting.host)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, meeting.world_size, options)


def listen(host: str, timeout_s: float) -> dist.TCPStore:
    """The sender's store, on `host` only and on a port that the kernel picks (`store.port`)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return store_of(socket.create_server((host, 0), family=family, backlog=512), timeout_s)


def store_of(listener: socket.socket, timeout_s: float) -> dist.TCPStore:
    """A store that answers on a socket that listens already, and owns it from now on: made without one, it would listen
    on all interfaces."""
    host, port = listener.getsockname()[:2]
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(
        host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def this_machine() -> str:
    """Equal for processes that can open each other's memory files: one kernel, one process namespace, one user."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {os.geteuid()}"


def open_sender(store: dist.Store, meeting: Rendezvous) -> BroadcastGroup:
    """The sender's end; blocks until all workers are there. Those that receive for their machine are in the group."""
    receiving = set(_receivers(store, meeting).values())
    return BroadcastGroup(store, replace(meeting, world_size=1 + len(receiving)), SENDER_RANK)


class Inlet:
    """A worker's end: `begin` an update, `receive` its buckets in order, at last the `checksums`.

    All of them raise a RuntimeError (of torch.distributed) when the sender is lost, or the time-out has passed.

    Args:
        rank: of this worker among all, from 1 on.
        device: where the bytes arrive; on a GPU every worker receives for itself.
    """

    def __init__(self, store: dist.Store, meeting: Rendezvous, rank: int, device: torch.device) -> None:
        shares = meeting.once_per_host and device.type == "cpu"
        store.set(f"machine/{rank}", this_machine() if shares else f"of rank {rank}")
        receivers = _receivers(store, meeting)
        self._store: dist.Store | None = store
        self._device = device
        self._receiver = receivers[rank]
        self._is_read = list(receivers.values()).count(rank) > 1  # by others
        self._group: BroadcastGroup | None = None
        if self._receiver == rank:
            receiving = sorted(set(receivers.values()))
            here = replace(meeting, world_size=1 + len(receiving))
            self._group = BroadcastGroup(store, here, 1 + receiving.index(rank))
        self._updates = 0  # begun
        self._told: list[str] = []  # keys in the store
        self._file: MemoryFile | None = None
        # CPU only, and kept: fresh pages for every push would cost more than the transfer.
        self._arena: torch.Tensor | None = None
        self._arena_name = ""

    @classmethod
    def join(cls, meeting: Rendezvous, rank: int, device: torch.device) -> Inlet:
        """Blocks until all ranks are there or the timeout has passed."""
        return cls(meeting.store(), meeting, rank, device)

    def begin(self, num_bytes: int) -> None:
        """Make room for an update of `num_bytes`; what an earlier one brought is overwritten.

        Raises:
            WeightPushError: the memory of the worker that receives here cannot be opened.
        """
        self._updates += 1
        if self._device.type != "cpu":
            return
        if self._group is None:
            name = self._hear("memory")
            if name != self._arena_name:
                self._arena, self._arena_name = open_memory_file(name.split()[0], num_bytes, ADVICE), name
            return
        if self._arena is None or self._arena.numel() != num_bytes:
            self._make_arena(num_bytes)
        self._forget()  # an update begins when everybody has read all of the one before
        self._tell("memory", self._arena_name)

    def receive(self, bucket: Bucket) -> torch.Tensor:
        """The bytes of the next bucket, uint8 [num_bytes]; on the CPU valid until the next update begins."""
        if self._arena is None:
            flat = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._device)
        else:
            flat = self._arena[bucket.start : bucket.start + bucket.num_bytes]
        what = f"bucket at {bucket.start}"
        if self._group is None:
            self._hear(what)
        else:
            self._group.broadcast(flat)
            self._tell(what, "has come")
        return flat

    def checksums(self, count: int) -> torch.Tensor:
        """What the sender has counted: int64 [count], on the CPU."""
        if self._group is None:
            return torch.tensor(json.loads(self._hear("checksums")), dtype=torch.int64)
        sums = torch.empty(count, dtype=torch.int64, device=self._device)
        self._group.broadcast(sums)
        sums = sums.cpu()
        self._tell("checksums", json.dumps(sums.tolist()))
        return sums

    def close(self) -> None:
        """Close the connections, which the sender notices; safe to call twice."""
        if self._group is not None:
            self._group.close()
        if self._file is not None:
            self._file.close()
        self._store = None

    def _make_arena(self, num_bytes: int) -> None:
        if not self._is_read:
            self._arena = torch.empty(num_bytes, dtype=torch.uint8)
            return
        if self._file is not None:
            self._file.close()
        self._file = MemoryFile(num_bytes)
        self._arena = self._file.tensor
        self._arena_name = f"{self._file.path} {self._updates}"  # a path alone may come twice

    def _key(self, what: str) -> str:
        return f"{self._receiver}/{self._updates}/{what}"

    def _tell(self, what: str, value: str) -> None:
        """Who reads what this worker receives."""
        if self._is_read:
            assert self._store is not None
            self._told.append(self._key(what))
            self._store.set(self._told[-1], value)

    def _hear(self, what: str) -> str:
        """Blocks until it is told, the sender has left or the time-out has passed."""
        if self._store is None:
            raise RuntimeError("the way to the sender is closed")
        return self._store.get(self._key(what)).decode()

    def _forget(self) -> None:
        for key in self._told:
            assert self._store is not None
            self._store.delete_key(key)
        self._told.clear()


def _receivers(store: dist.Store, meeting: Rendezvous) -> dict[int, int]:
    """By rank of a worker, the rank that receives for it: the first on its machine."""
    first: dict[bytes, int] = {}
    return {rank: first.setdefault(store.get(f"machine/{rank}"), rank) for rank in range(1, meeting.world_size)}
