"""LM head, log-probabilities and entropies in one operation, chunk by chunk: no [tokens, vocabulary] tensor exists.

The backward recomputes the logits of the rows that got a gradient. Use it for forward-only passes, for cross entropy,
and where a token's coefficient depends on other tokens (sequence-level ratios). `linear_policy_loss` needs one matrix
product less where coefficients are per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_r1reward.kernels.lm_head import (
    Head,
    HeadOptions,
    add_weight_gradient_,
    autograd_weight_gradient,
    weight_gradient_buffer,
)
from megatron_r1reward.kernels.policy_loss.row_kernels import RowStatistics
from megatron_r1reward.kernels.policy_loss.torch_rows import merge_parts


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RH: torch.Tensor, weight_VH: torch.Tensor, targets_R: torch.Tensor, head: Head
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(hidden_RH)
        statistics_3R = torch.empty(3, rows, dtype=torch.float32, device=hidden_RH.device)
        buffer_KV = head.buffer(hidden_RH, weight_VH)
        for here in head.chunks(rows):
            logits = head.logits(hidden_RH[here], weight_VH, targets_R[here], buffer_KV)
            merged = merge_parts(head.gather(head.kernels.statistics(logits)))
            statistics_3R[:, here] = torch.stack([merged.log_probs, merged.entropy, merged.normalizer])
        ctx.save_for_backward(hidden_RH, weight_VH, targets_R, statistics_3R[1:])
        ctx.head, ctx.weight = head, weight_VH
        return statistics_3R[0].clone(), statistics_3R[1].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_log_probs_R, grad_entropy_R = (gradient.float() for gradient in gradients)
        hidden_RH, weight_VH, targets_R, (entropy_R, normalizer_R) = ctx.saved_tensors
        head: Head = ctx.head
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_RH = torch.zeros_like(hidden_RH)
        grad_weight_VH = weight_gradient_buffer(ctx.weight) if wants_weight else None
        # Rows without gradient (filtered, clipped or masked tokens) are not multiplied again.
        active_A = ((grad_log_probs_R != 0) | (grad_entropy_R != 0)).nonzero().squeeze(1)
        with_entropy = bool((grad_entropy_R != 0).any())
        buffer_KV = head.buffer(active_A, weight_VH)
        for here in head.chunks(len(active_A)):
            row_C = active_A[here]
            chunk_CH = hidden_RH[row_C]
            logits = head.logits(chunk_CH, weight_VH, targets_R[row_C], buffer_KV)
            statistics = RowStatistics(
                log_probs=normalizer_R[row_C], entropy=entropy_R[row_C], normalizer=normalizer_R[row_C]
            )
            slopes_C = grad_log_probs_R[row_C], grad_entropy_R[row_C] if with_entropy else None
            head.kernels.gradient_(logits, statistics, *slopes_C)
            grad_logits_CV = logits.logits.to(weight_VH.dtype)
            if wants_hidden:
                grad_hidden_RH[row_C] = grad_logits_CV @ weight_VH
            if grad_weight_VH is not None:
                add_weight_gradient_(grad_weight_VH, grad_logits_CV, chunk_CH)
        weight_gradient = None if grad_weight_VH is None else autograd_weight_gradient(ctx.weight, grad_weight_VH)
        return head.reduce(grad_hidden_RH), weight_gradient, None, None


def linear_log_probs(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_R: torch.Tensor,
    *,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    options: HeadOptions = HeadOptions(),  # noqa: B008 (frozen)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each row's distribution.

    Args:
        hidden_RH: final hidden states of the rows that carry a loss, the same on every tensor-parallel rank.
        weight_VH: this rank's rows of the LM head, [V / tp, H]. Where Megatron's DDP has given it a float32
            `main_grad`, the gradient is added there.
        targets_R: int64 global token ids.
        tensor_parallel_group: None or a group of one rank: the whole vocabulary is here.

    Returns:
        (log_probs_R, entropy_R), float32, natural log.

    Raises:
        ValueError: shapes do not fit, or the implementation cannot run here.
    """
    head = Head.of_call(hidden_RH, weight_VH, tensor_parallel_group, options, None)
    return _LinearLogProbs.apply(hidden_RH, weight_VH, targets_R, head)
