"""Memory that the trainer and workers on the same machine both see: a memory file, or a GPU buffer by CUDA IPC.

Handles travel as JSON (numbers and base64), so nothing is unpickled; vLLM's own ipc backend pickles them.
"""

from __future__ import annotations

import base64
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from megatron_r1reward.weight_sync import WeightPushError

log = logging.getLogger(__name__)
IPC_ADVICE = "rollout.weight_transport 'ipc' needs servers on the trainer's machine; use 'gloo' or 'nccl'"


@dataclass(frozen=True, kw_only=True)
class SharedBuffer:
    """How to open the sender's buffer: part of the body of /init_weight_transfer_engine."""

    num_bytes: int
    path: str | None = None  # memory file
    cuda: dict[str, Any] | None = None  # {gpu uuid: arguments of storage._new_shared_cuda, bytes as base64}


class MemoryFile:
    """A flat uint8 tensor in anonymous shared memory: without a name in /dev/shm, so nothing can be left behind."""

    def __init__(self, num_bytes: int) -> None:
        self._descriptor = os.memfd_create("r1reward-weights", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, num_bytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.tensor = open_memory_file(self.path, num_bytes, "is /proc mounted?")
        self._is_pinned = False

    def pin(self) -> None:
        """Let a GPU copy to and from it by itself: several times the speed of pageable memory, and the host goes on."""
        code = torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), self.tensor.numel(), 0)
        self._is_pinned = int(code) == 0
        if not self._is_pinned:
            log.warning(
                "%.1f GB of host memory for weights cannot be pinned (CUDA error %d): pushes are slower. Raise the "
                "limit of locked memory (ulimit -l)",
                self.tensor.numel() / 1e9,
                int(code),
            )

    def close(self) -> None:
        """Give the descriptor back; the memory lives until the last mapping is gone."""
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
            self._is_pinned = False
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_memory_file(path: str, num_bytes: int, advice: str) -> torch.Tensor:
    """uint8 [num_bytes], shared.

    Args:
        advice: what to do if it cannot be opened.

    Raises:
        WeightPushError: there is no such file here: its owner is on another machine, another user, or gone.
    """
    try:
        return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
    except RuntimeError as error:
        raise WeightPushError(f"cannot open the memory {path} of another process ({error}): {advice}") from error


def export_cuda(flat: torch.Tensor) -> SharedBuffer:
    """Handles of a uint8 CUDA tensor that is a storage of its own and outlives its users."""
    device = torch.cuda.get_device_properties(flat.device)
    arguments = [_encode(value) for value in flat.untyped_storage()._share_cuda_()]
    return SharedBuffer(num_bytes=flat.numel(), cuda={str(device.uuid): arguments})


def open_cuda(shared: SharedBuffer, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes] on `device`, which must be the sender's GPU.

    Raises:
        WeightPushError: it is another GPU.
    """
    assert shared.cuda is not None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    if uuid not in shared.cuda:
        raise WeightPushError(
            f"the weights are on GPU {', '.join(shared.cuda)}, this worker is on {uuid}: transport 'ipc' is for "
            "servers on the trainer's GPU; use 'nccl'"
        )
    _, *arguments = (_decode(value) for value in shared.cuda[uuid])
    storage = torch.UntypedStorage._new_shared_cuda(device.index or 0, *arguments)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (shared.num_bytes,), (1,))


def _encode(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _decode(value: Any) -> Any:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) else value
