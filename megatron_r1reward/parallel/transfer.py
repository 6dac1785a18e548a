"""Copies from the host that the host does not wait for."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor`, a CPU tensor, on `device`.

    A plain `.to(device)` waits until the device has done all that was asked of it before. From pinned memory the copy
    takes its place in the stream, and the host goes on.
    """
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
