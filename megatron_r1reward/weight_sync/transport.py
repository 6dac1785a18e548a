"""What a weight transport does: one interface, one file per transport (weights_gloo, weights_nccl, weights_ipc)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, Any

import torch

from megatron_r1reward.weight_sync.admin_api import ControlPlane
from megatron_r1reward.weight_sync.buckets import Bucket, WeightUpdate

if TYPE_CHECKING:
    from megatron_r1reward.weight_sync.snapshot import BucketSource


class Transport(ABC):
    """Carries the buckets of one update to every worker of every server.

    The life of a connection: connect -> send, send, ... -> disconnect; a failed send is followed by disconnect.
    `push.WeightPush` puts the steps of vLLM's protocol around it.
    """

    device: torch.device  # where it takes buckets from
    needs_memory_file = False  # whether the buckets must lie in a snapshot that other processes can open

    @abstractmethod
    def connect(self, control: ControlPlane, source: BucketSource) -> None:
        """Open the way to every worker of `control.targets`.

        Raises:
            WeightPushError: a server refused, or did not come in time.
        """

    @abstractmethod
    def send(self, control: ControlPlane, update: WeightUpdate, source: BucketSource) -> None:
        """Deliver all buckets; returns when every worker has received, verified and loaded them.

        Raises:
            WeightPushError: a server refused, or was lost.
        """

    @abstractmethod
    def disconnect(self) -> None:
        """Close the way, at any time, even if never connected; workers that wait for data notice soon."""

    def close(self) -> None:
        """Disconnect for good."""
        self.disconnect()


def wait_for(ours: Future[Any], theirs: Iterator[Future[Any]] | list[Future[Any]]) -> Any:
    """The result of our end of an exchange; raises at once when one of the servers' ends fails."""
    pending: set[Future[Any]] = {ours, *theirs}
    while not ours.done():
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for call in done:
            call.result()
    return ours.result()


Filled = Iterator[tuple[Bucket, torch.Tensor]]
