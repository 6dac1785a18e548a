"""The flat response axis: the response tokens of N sequences back to back, cut by `cu_response`.

Suffixes name axes: `_R` is the flat response axis (one entry per response token), `_N` the sequences. Sequence i owns
tokens [cu_response[i], cu_response[i + 1]).
"""

from __future__ import annotations

import torch
from torch import Tensor


def response_lengths(cu_response: Tensor) -> Tensor:
    """Tokens of each response, int64 [N], from offsets int64 [N + 1].

    Raises ValueError when the offsets do not start at 0, or when a response is empty: it has no token that could carry
    its reward.
    """
    if cu_response.numel() == 0 or int(cu_response[0]) != 0:
        raise ValueError(f"cu_response must start with offset 0, got {cu_response.tolist()[:4]}: pass [0, len_0, ...]")
    lengths_N = cu_response.diff()
    if bool((lengths_N < 1).any()):
        first = int((lengths_N < 1).nonzero()[0])
        raise ValueError(f"response {first} has {int(lengths_N[first])} tokens: drop empty responses from the batch")
    return lengths_N


def sequence_index(cu_response: Tensor) -> Tensor:
    """The sequence that each response token belongs to, int64 [R]."""
    lengths_N = response_lengths(cu_response)
    return torch.arange(len(lengths_N), device=lengths_N.device).repeat_interleave(lengths_N)
