"""Rows for the LM head out of sequence-parallel hidden states: only the rows that are needed travel."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_SH: torch.Tensor, positions_R: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ranks, rank, length = group.size(), dist.get_rank(group), hidden_SH.shape[0]
        owner_R = positions_R.div(length, rounding_mode="floor")
        counts = torch.bincount(owner_R, minlength=ranks)
        order_R = owner_R.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        place_R = torch.empty_like(order_R)  # of each row among those of its owner
        place_R[order_R] = torch.arange(len(order_R), device=order_R.device) - starts[owner_R[order_R]]
        widest = int(counts.max()) if len(positions_R) else 0
        mine_R = owner_R == rank
        local_M = positions_R[mine_R] - rank * length
        sent_KH = hidden_SH.new_zeros(widest, hidden_SH.shape[1])
        sent_KH[place_R[mine_R]] = hidden_SH[local_M]
        received_TKH = hidden_SH.new_empty(ranks, widest, hidden_SH.shape[1])
        dist.all_gather_into_tensor(received_TKH.view(-1, hidden_SH.shape[1]), sent_KH, group=group)
        ctx.save_for_backward(owner_R, place_R, mine_R, local_M)
        ctx.group, ctx.shape, ctx.widest = group, hidden_SH.shape, widest
        return received_TKH[owner_R, place_R]

    @staticmethod
    def backward(ctx: Any, grad_RH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        owner_R, place_R, mine_R, local_M = ctx.saved_tensors
        ranks, width = ctx.group.size(), ctx.shape[1]
        shares_TKH = grad_RH.new_zeros(ranks, ctx.widest, width)
        shares_TKH[owner_R, place_R] = grad_RH
        own_KH = grad_RH.new_empty(ctx.widest, width)
        dist.reduce_scatter_tensor(own_KH, shares_TKH.view(-1, width), group=ctx.group)
        grad_SH = grad_RH.new_zeros(ctx.shape)
        grad_SH.index_add_(0, local_M, own_KH[place_R[mine_R]])
        return grad_SH, None, None


def gather_sequence_parallel_rows(
    hidden_SH: torch.Tensor, positions_R: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Rows `positions_R` of the whole sequence on every rank, [R, H], from this rank's slice.

    The backward sums the ranks' gradients and returns each rank its own rows with one reduce-scatter: pass
    `reduce_hidden_gradient=False` to the head that consumes the rows.

    Args:
        hidden_SH: rank r of the tensor-parallel group holds positions [r S, (r + 1) S), S = T / tp.
        positions_R: int64 positions in the whole sequence, the same on every rank.
        group: tensor-parallel group.

    Raises:
        ValueError: a position lies outside the sequence.
    """
    length = hidden_SH.shape[0] * group.size()
    if len(positions_R) and not (int(positions_R.min()) >= 0 and int(positions_R.max()) < length):
        raise ValueError(f"positions_R reach {int(positions_R.max())}, but the sequence has {length} positions")
    return _GatherRows.apply(hidden_SH, positions_R, group)
