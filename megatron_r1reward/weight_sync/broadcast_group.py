"""A broadcast group of the trainer and all workers of all servers: over TCP (gloo) or between GPUs (nccl)."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_r1reward.network.tokens import is_loopback

SENDER_RANK = 0


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
    """A process group of its own, apart from torch.distributed's default group."""

    def __init__(self, store: dist.Store, meeting: Rendezvous, rank: int) -> None:
        timeout = timedelta(seconds=meeting.timeout_s)
        self._store: dist.Store | None = store  # must live as long as the group
        self._group: Any
        if meeting.backend == "gloo":
            self._group = _gloo_group(store, meeting, rank, timeout)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, meeting.world_size, options)

    @classmethod
    def join(cls, meeting: Rendezvous, rank: int) -> BroadcastGroup:
        """Join as a worker; blocks until all ranks are there or the timeout has passed."""
        return cls(meeting.store(), meeting, rank)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send (rank 0) or receive (the others) a contiguous tensor: on the CPU with gloo, on the GPU with nccl.

        Returns when `tensor` may be changed (sender) or read (receivers).
        """
        if self._group is None:
            raise RuntimeError("the broadcast group is closed")  # what torch raises for one that is aborted
        options = dist.BroadcastOptions()
        options.rootRank = SENDER_RANK
        options.rootTensor = 0
        self._group.broadcast([tensor], options).wait()
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()  # nccl's wait() only orders streams

    def close(self) -> None:
        """Close the connections; a peer that waits for data gets an error. Safe to call twice."""
        group, self._group = self._group, None  # gloo closes them when the group is gone
        if group is not None:
            group.abort()
        self._store = None  # the sender's goes with it, and sets free who waits there


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
    listener = socket.create_server((host, 0), family=family, backlog=512)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store would listen on all interfaces
    )
