"""What happened to each row, as bits of one int32: metrics cost no second pass."""

from __future__ import annotations

from enum import IntFlag

import torch


class Flag(IntFlag):
    """The Triton and CUDA sources hold the same numbers; a test compares them through the torch implementation."""

    ACTIVE = 1  # its aggregation weight is not 0
    FILTERED = 2  # active, and the advantage was rejected by the filter rule or is not finite
    PRECLIPPED_LOW = 4
    PRECLIPPED_HIGH = 8
    CLIPPED_LOW = 16
    CLIPPED_HIGH = 32  # dual clip included
    NON_FINITE = 64  # the loss or its gradient is NaN or infinite


def count_flags(flags_R: torch.Tensor) -> dict[str, int]:
    """Number of rows that carry each flag, by lower-case name. One device synchronisation."""
    bits = torch.tensor([int(flag) for flag in Flag], dtype=flags_R.dtype, device=flags_R.device)
    counts = ((flags_R[:, None] & bits) != 0).sum(0).tolist()
    return {str(flag.name).lower(): int(number) for flag, number in zip(Flag, counts, strict=True)}
