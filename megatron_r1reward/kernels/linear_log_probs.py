"""LM head and log-probabilities in one operation, chunk by chunk: no [tokens, vocabulary] tensor exists.

Vocabulary-parallel: every tensor-parallel rank holds V/tp columns and exchanges four numbers per row. Backward
recomputes the logits of a chunk instead of storing them. All statistics are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

DEFAULT_CHUNK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """This rank's slice [start, start + V/tp) of the vocabulary."""

    group: dist.ProcessGroup | None
    start: int

    def reduce(self, tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        if self.group is not None:
            dist.all_reduce(tensor, op=operation, group=self.group)
        return tensor


def _local_targets(targets_R: torch.Tensor, shard: _Shard, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target within the shard (0 where it lies elsewhere) and whether it lies here."""
    column_R = targets_R - shard.start
    here_R = (column_R >= 0) & (column_R < width)
    return torch.where(here_R, column_R, 0), here_R


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RH: torch.Tensor, weight_VH: torch.Tensor, targets_R: torch.Tensor, shard: _Shard, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = hidden_RH.shape[0], weight_VH.shape[0]
        log_probs_R = hidden_RH.new_empty(rows, dtype=torch.float32)
        entropy_R = torch.empty_like(log_probs_R)
        normalizer_R = torch.empty_like(log_probs_R)
        for start in range(0, rows, chunk):
            here = slice(start, min(start + chunk, rows))
            logits_CV = (hidden_RH[here] @ weight_VH.t()).float()
            peak_C = shard.reduce(logits_CV.amax(dim=-1), dist.ReduceOp.MAX)
            shifted_CV = logits_CV - peak_C[:, None]
            exp_CV = shifted_CV.exp()
            column_C, mine_C = _local_targets(targets_R[here], shard, width)
            picked_C = torch.where(mine_C, shifted_CV.gather(1, column_C[:, None]).squeeze(1), 0.0)
            sums_3C = torch.stack([exp_CV.sum(-1), (exp_CV * shifted_CV).sum(-1), picked_C])
            total_C, weighted_C, target_C = shard.reduce(sums_3C)
            log_total_C = total_C.log()
            log_probs_R[here] = target_C - log_total_C
            entropy_R[here] = log_total_C - weighted_C / total_C
            normalizer_R[here] = peak_C + log_total_C
        ctx.save_for_backward(hidden_RH, weight_VH, targets_R, normalizer_R, entropy_R)
        ctx.shard, ctx.chunk = shard, chunk
        return log_probs_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_log_probs_R, grad_entropy_R = gradients
        hidden_RH, weight_VH, targets_R, normalizer_R, entropy_R = ctx.saved_tensors
        shard, width = ctx.shard, weight_VH.shape[0]
        grad_hidden_RH = torch.zeros_like(hidden_RH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        # Rows without gradient (filtered, clipped or masked tokens) are not multiplied again.
        active_A = ((grad_log_probs_R != 0) | (grad_entropy_R != 0)).nonzero().squeeze(1)
        for start in range(0, len(active_A), ctx.chunk):
            row_C = active_A[start : start + ctx.chunk]
            chunk_CH = hidden_RH[row_C]
            log_p_CV = (chunk_CH @ weight_VH.t()).float() - normalizer_R[row_C, None]
            p_CV = log_p_CV.exp()
            grad_lp_C, grad_h_C = grad_log_probs_R[row_C], grad_entropy_R[row_C]
            # d log p_y / dz = [y] - p ;  dH / dz = -p (ln p + H)
            grad_CV = -p_CV * (grad_lp_C[:, None] + grad_h_C[:, None] * (log_p_CV + entropy_R[row_C, None]))
            column_C, mine_C = _local_targets(targets_R[row_C], shard, width)
            grad_CV.scatter_add_(1, column_C[:, None], torch.where(mine_C, grad_lp_C, 0.0)[:, None])
            grad_logits_CV = grad_CV.to(weight_VH.dtype)
            grad_hidden_RH[row_C] = grad_logits_CV @ weight_VH
            grad_weight_VH += (grad_logits_CV.t() @ chunk_CH).float()
        shard.reduce(grad_hidden_RH)
        return grad_hidden_RH, grad_weight_VH.to(weight_VH.dtype), None, None, None


def linear_log_probs(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_R: torch.Tensor,
    *,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    chunk_rows: int = DEFAULT_CHUNK_ROWS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each row's distribution.

    Args:
        hidden_RH: final hidden states of the rows that carry a loss, the same on every tensor-parallel rank.
        weight_VH: this rank's rows of the LM head, [V / tp, H].
        targets_R: int64 global token ids.
        tensor_parallel_group: None or a group of one rank: the whole vocabulary is here.
        chunk_rows: rows whose logits exist at one time.

    Returns:
        (log_probs_R, entropy_R), float32, natural log, untempered softmax over all V columns.
    """
    size = 1 if tensor_parallel_group is None else tensor_parallel_group.size()
    group = tensor_parallel_group if size > 1 else None
    rank = dist.get_rank(group) if group is not None else 0
    shard = _Shard(group=group, start=rank * weight_VH.shape[0])
    return _LinearLogProbs.apply(hidden_RH, weight_VH, targets_R, shard, chunk_rows)
