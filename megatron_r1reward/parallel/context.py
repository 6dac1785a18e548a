"""Context parallelism over packed sequences: which tokens a rank holds, and how values of all ranks come together.

Every sequence is cut into 2 * size chunks of equal length; rank r holds chunks r and 2 * size - 1 - r. Under a causal
mask all ranks then do the same work, whatever the lengths of the sequences. This is also the order that
Transformer Engine and megatron-core's rotary embedding expect of packed sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

from megatron_r1reward.parallel.setup import to_device


def zigzag_positions(bounds: Sequence[int], size: int, rank: int) -> torch.Tensor:
    """Positions in the packed row of the tokens that `rank` of `size` holds: int64 [T / size], on the CPU.

    Args:
        bounds: of the S sequences, S + 1 numbers.

    Raises:
        ValueError: a sequence does not divide into 2 * size chunks.
    """
    parts = []
    for start, end in itertools.pairwise(bounds):
        if (end - start) % (2 * size):
            raise ValueError(
                f"a packed sequence of {end - start} tokens does not divide into 2 x {size} chunks for context "
                f"parallelism: pad sequences to a multiple of {2 * size}"
            )
        chunk = (end - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class ContextSplit:
    """This rank's share of one packed row of T tokens.

    `positions` int64 [T / size]: global positions of the local tokens. `local_index` int64 [T]: where a global position
    is found locally, -1 where another rank holds it. `gathered_order` int64 [T]: puts the tokens of all ranks, back to
    back in rank order, into the order of the row.
    """

    group: dist.ProcessGroup
    positions: torch.Tensor
    local_index: torch.Tensor
    gathered_order: torch.Tensor

    def rows(self, positions_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of `positions_R` are here, as indices into it, and their local indices."""
        local_R = self.local_index[positions_R]
        here = (local_R >= 0).nonzero().squeeze(1)
        return here, local_R[here]

    def collect(self, values_XA: torch.Tensor, here_A: torch.Tensor, total: int) -> torch.Tensor:
        """All ranks' columns on every rank: [X, A] at columns `here_A` -> [X, total].

        Every rank sees all rows, so a loss may look at whole sequences; gradients flow only into the local columns.
        Each rank computes the same loss, so its denominator counts on one context-parallel rank only.
        """
        full_XR = values_XA.new_zeros(values_XA.shape[0], total).index_copy(1, here_A, values_XA)
        return reduce_from_tensor_model_parallel_region(full_XR, group=self.group)


def split_context(bounds: Sequence[int], group: dist.ProcessGroup, device: torch.device) -> ContextSplit | None:
    """The share of this rank of `group`, on `device`; None when the group has one rank."""
    if group.size() == 1:
        return None
    positions = zigzag_positions(bounds, group.size(), group.rank())
    local_index = torch.full((bounds[-1],), -1, dtype=torch.int64)
    local_index[positions] = torch.arange(len(positions))
    return ContextSplit(
        group=group,
        positions=to_device(positions, device),
        local_index=to_device(local_index, device),
        gathered_order=to_device(gathered_order(bounds, group.size()), device),
    )


def gathered_order(bounds: Sequence[int], size: int) -> torch.Tensor:
    """Index that puts rank-major gathered tokens back into sequence order: int64 [T], on the CPU."""
    return torch.argsort(torch.cat([zigzag_positions(bounds, size, rank) for rank in range(size)]))


def assign_images(patches: list[int], ranks: int) -> list[list[int]]:
    """Images of each rank, so that patches are balanced: largest first to the least loaded. Deterministic."""
    loads = [0] * ranks
    owned: list[list[int]] = [[] for _ in range(ranks)]
    for image in sorted(range(len(patches)), key=lambda i: (-patches[i], i)):
        rank = loads.index(min(loads))
        loads[rank] += patches[image]
        owned[rank].append(image)
    return [sorted(images) for images in owned]


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks of a tensor x context group, back to back in rank order: [A_r, H] -> [sum A, H].

    Backward: every tensor-parallel rank holds the same gradient and every context-parallel rank its own part, so the
    gradient is summed over the context group alone.
    """

    @staticmethod
    def forward(
        ctx: Any, rows_AH: torch.Tensor, counts: list[int], group: dist.ProcessGroup, context: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.span = sum(counts[: group.rank()]), rows_AH.shape[0]
        ctx.context = context
        longest = max(counts)
        padded = rows_AH.new_zeros(longest, rows_AH.shape[1])
        padded[: rows_AH.shape[0]] = rows_AH
        gathered = rows_AH.new_empty(group.size() * longest, rows_AH.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=group)
        parts = gathered.split(longest)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0].contiguous().clone()
        if ctx.context.size() > 1:
            dist.all_reduce(gradient, group=ctx.context)
        start, length = ctx.span
        return gradient[start : start + length], None, None, None


def gather_rows(
    rows_AH: torch.Tensor, counts: list[int], *, group: dist.ProcessGroup, context: dist.ProcessGroup
) -> torch.Tensor:
    """Rows of all ranks of `group` (tensor x context parallel) on every rank; differentiable.

    Args:
        rows_AH: this rank's rows, counts[group.rank()] of them.
        counts: rows of every rank.
        context: the context-parallel group, over which gradients add up.
    """
    return _GatherRows.apply(rows_AH, counts, group, context)
