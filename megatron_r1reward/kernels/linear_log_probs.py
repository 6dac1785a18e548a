"""LM head, log-probabilities and entropies in one operation, chunk by chunk: no [tokens, vocabulary] tensor exists.

The backward recomputes the logits of the rows that got a gradient. Use it for forward-only passes, for cross entropy,
and where a token's coefficient depends on other tokens (sequence-level ratios). `linear_policy_loss` needs one matrix
product less where coefficients are per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_r1reward.kernels.head_chunks import (
    Head,
    add_weight_gradient_,
    autograd_weight_gradient,
    chunk_logits,
    make_head,
    weight_gradient_buffer,
)
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions
from megatron_r1reward.kernels.policy_loss.statistics import RowStatistics, gather_parts, merge_parts


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: torch.Tensor,
        weight_VH: torch.Tensor,
        targets_R: torch.Tensor,
        head: Head,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = hidden_RH.shape[0]
        statistics_3R = torch.empty(3, rows, dtype=torch.float32, device=hidden_RH.device)
        buffer_KV = hidden_RH.new_empty(min(rows, head.chunk_rows), weight_VH.shape[0], dtype=head.logits_dtype)
        read_R = torch.ones(rows, dtype=torch.bool, device=hidden_RH.device)
        for here in head.chunks(rows):
            logits_CV = chunk_logits(hidden_RH[here], weight_VH, buffer_KV)
            parts_4C = head.kernels.statistics(logits_CV, targets_R[here], read_R[here], head.shard, temperature)
            merged = merge_parts(gather_parts(parts_4C, head.group))
            statistics_3R[:, here] = torch.stack([merged.log_probs, merged.entropy, merged.normalizer])
        ctx.save_for_backward(hidden_RH, weight_VH, targets_R, statistics_3R[1:])
        ctx.head, ctx.temperature, ctx.weight = head, temperature, weight_VH
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
        rows = min(len(active_A), head.chunk_rows)
        buffer_KV = hidden_RH.new_empty(rows, weight_VH.shape[0], dtype=head.logits_dtype)
        for here in head.chunks(len(active_A)):
            row_C = active_A[here]
            chunk_CH = hidden_RH[row_C]
            logits_CV = chunk_logits(chunk_CH, weight_VH, buffer_KV)
            statistics = RowStatistics(
                log_probs=normalizer_R[row_C], entropy=entropy_R[row_C], normalizer=normalizer_R[row_C]
            )
            head.kernels.gradient_(
                logits_CV,
                targets_R[row_C],
                statistics,
                grad_log_probs_R[row_C],
                grad_entropy_R[row_C],
                head.shard,
                ctx.temperature,
                with_entropy=with_entropy,
            )
            grad_logits_CV = logits_CV.to(weight_VH.dtype)
            if wants_hidden:
                grad_hidden_RH[row_C] = grad_logits_CV @ weight_VH
            if grad_weight_VH is not None:
                add_weight_gradient_(grad_weight_VH, grad_logits_CV, chunk_CH)
        weight_gradient = None if grad_weight_VH is None else autograd_weight_gradient(ctx.weight, grad_weight_VH)
        return head.reduce(grad_hidden_RH), weight_gradient, None, None, None


def linear_log_probs(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    targets_R: torch.Tensor,
    *,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    chunk_rows: int | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    logits_dtype: torch.dtype | None = None,
    reduce_hidden_gradient: bool = True,
    implementation: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each row's distribution.

    Args:
        hidden_RH: final hidden states of the rows that carry a loss, the same on every tensor-parallel rank.
        weight_VH: this rank's rows of the LM head, [V / tp, H]. Where Megatron's DDP has given it a float32
            `main_grad`, the gradient is added there.
        targets_R: int64 global token ids.
        tensor_parallel_group: None or a group of one rank: the whole vocabulary is here.
        chunk_rows: rows whose logits exist at one time; None: by device and vocabulary.
        vocab_size: rows of the whole LM head that are no padding; None: all.
        temperature: divides the logits.
        logits_dtype: dtype in which a chunk's logits are kept; None: that of the hidden states.
        reduce_hidden_gradient: False leaves the sum over the tensor-parallel ranks to the caller
            (`gather_sequence_parallel_rows` does it with a reduce-scatter).
        implementation: "auto", "torch" or "triton"; see `dispatch`.

    Returns:
        (log_probs_R, entropy_R), float32, natural log.

    Raises:
        ValueError: shapes do not fit, or the implementation cannot run here.
    """
    head = make_head(
        hidden_RH,
        weight_VH,
        group=tensor_parallel_group,
        vocab_size=vocab_size,
        chunk_rows=chunk_rows,
        logits_dtype=logits_dtype,
        implementation=implementation,
        reduce_hidden_gradient=reduce_hidden_gradient,
        options=PolicyLossOptions(temperature=temperature),
    )
    return _LinearLogProbs.apply(hidden_RH, weight_VH, targets_R, head, temperature)
