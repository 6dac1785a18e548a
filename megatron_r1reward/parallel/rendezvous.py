"""How ranks find each other without a port that somebody had to choose: rank 0 listens on one that the kernel picks and
publishes it in a file of the run directory. Jobs that share a node cannot collide.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_r1reward.run_dir import Record, exists_on_shared

_POLL_INTERVAL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where to meet: `path` on a file system that all ranks see; `host`, the name under which others reach this one.

    The file must belong to this start of the job alone: one that an earlier start left would send ranks to nobody.
    """

    path: Path
    host: str

    def store(self, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
        """The store that `init_process_group` takes; blocks until rank 0 is there.

        Raises:
            ValueError: rank 0 has published nothing within `timeout`.
        """
        if rank == 0:
            store = dist.TCPStore(
                self.host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False
            )  # fmt: skip
            _Address(host=self.host, port=store.port).write(self.path)
            return store
        deadline = time.monotonic() + timeout.total_seconds()
        while not exists_on_shared(self.path):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"rank {rank}: no {self.path} after {timeout}: rank 0 did not start, or the run directory is not "
                    "on a file system that all nodes share"
                )
            time.sleep(_POLL_INTERVAL_S)
        address = _Address.read(self.path)
        assert address is not None
        return dist.TCPStore(address.host, address.port, world_size, is_master=False, timeout=timeout)


@dataclass(frozen=True, kw_only=True)
class _Address(Record):
    host: str
    port: int
