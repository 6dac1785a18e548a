"""LM head and StableReinforce loss in one operation; the gradients are formed in the forward, chunk by chunk.

Only rows that can receive a gradient are gathered and multiplied: 6 rho R H V operations for a share rho of such rows,
where a backward that recomputes the logits needs 8 rho and one that multiplies all rows 6. No [rows, vocabulary] tensor
exists.
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
    takes_main_grad,
)
from megatron_r1reward.kernels.policy_loss.from_logits import PolicyLossOutput
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions, TokenInputs
from megatron_r1reward.kernels.policy_loss.statistics import gather_parts
from megatron_r1reward.kernels.policy_loss.token_loss import idle_flags, rows_with_gradient

SECOND_BACKWARD = "linear_policy_loss has handed out its gradients: its backward runs once. Call the forward again"


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: torch.Tensor,
        weight_VH: torch.Tensor,
        inputs: TokenInputs,
        options: PolicyLossOptions,
        head: Head,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, ...]:
        rows_A = rows_with_gradient(inputs, options).nonzero().squeeze(1)
        wants_hidden, wants_weight = (with_gradient and wanted for wanted in ctx.needs_input_grad[:2])
        hidden_AH, active = hidden_RH[rows_A], inputs.take(rows_A)
        grad_hidden_AH = torch.zeros_like(hidden_AH) if wants_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        results_3R = torch.zeros(3, len(hidden_RH), dtype=torch.float32, device=hidden_RH.device)
        flags_R = idle_flags(inputs, options)
        buffer_KV = hidden_RH.new_empty(min(len(rows_A), head.chunk_rows), len(weight_VH), dtype=head.logits_dtype)
        for here in head.chunks(len(rows_A)):
            chunk_CH, chunk = hidden_AH[here], active.take(here)
            read_C = torch.ones(len(chunk_CH), dtype=torch.bool, device=chunk_CH.device)
            logits_CV = chunk_logits(chunk_CH, weight_VH, buffer_KV)
            parts_4C = head.kernels.statistics(logits_CV, chunk.targets, read_C, head.shard, options.temperature)
            merged, loss = head.kernels.loss(gather_parts(parts_4C, head.group), chunk, read_C, options)
            results_3R[:, rows_A[here]] = torch.stack([merged.log_probs, merged.entropy, loss.loss])
            flags_R[rows_A[here]] = loss.flags
            if not with_gradient:
                continue
            live_L = ((loss.grad_log_prob != 0) | (loss.grad_entropy != 0)).nonzero().squeeze(1)
            if len(live_L) < len(chunk_CH):  # clipped tokens have no gradient: one copy saves two products of a row
                logits_CV, chunk_CH = logits_CV[live_L], chunk_CH[live_L]
            head.kernels.gradient_(
                logits_CV,
                chunk.targets[live_L],
                merged.take(live_L),
                loss.grad_log_prob[live_L],
                loss.grad_entropy[live_L],
                head.shard,
                options.temperature,
                with_entropy=options.entropy_coefficient != 0.0,
            )
            grad_logits_LV = logits_CV.to(weight_VH.dtype)
            if grad_hidden_AH is not None:
                grad_hidden_AH[here.start + live_L] = grad_logits_LV @ weight_VH
            if grad_weight_VH is not None:
                add_weight_gradient_(grad_weight_VH, grad_logits_LV, chunk_CH)
        ctx.gradients, ctx.rows, ctx.shape = (grad_hidden_AH, grad_weight_VH), rows_A, hidden_RH.shape
        ctx.head, ctx.weight = head, weight_VH
        log_probs_R, entropy_R, loss_R = (row.clone() for row in results_3R)
        ctx.mark_non_differentiable(log_probs_R, entropy_R, loss_R, flags_R)
        return loss_R.sum(), log_probs_R, entropy_R, loss_R, flags_R

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(SECOND_BACKWARD)
        (grad_hidden_AH, grad_weight_VH), ctx.gradients = ctx.gradients, None
        grad_hidden_RH = weight_gradient = None
        if grad_hidden_AH is not None:
            grad_hidden_AH = ctx.head.reduce(grad_hidden_AH).mul_(upstream)
            grad_hidden_RH = grad_hidden_AH.new_zeros(ctx.shape).index_copy_(0, ctx.rows, grad_hidden_AH)
        if grad_weight_VH is not None:
            grad_weight_VH.mul_(upstream)
            if takes_main_grad(ctx.weight):
                ctx.weight.main_grad.add_(grad_weight_VH)
            weight_gradient = autograd_weight_gradient(ctx.weight, grad_weight_VH)
        return grad_hidden_RH, weight_gradient, None, None, None, None


def linear_policy_loss(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    inputs: TokenInputs,
    options: PolicyLossOptions,
    *,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    reduce_hidden_gradient: bool = True,
    implementation: str = "auto",
) -> PolicyLossOutput:
    """The loss of R rows from their hidden states.

    Rows that cannot receive a gradient (weight 0; or advantage 0 or rejected, and no KL or entropy term) are not
    multiplied: their log-prob, entropy and loss are 0, their flags say why. Without gradients (`torch.no_grad`) only
    the first of the three matrix products runs. With context parallelism each rank passes its own rows; the caller adds
    up `total`.

    Memory beside the result: one chunk of logits, the float32 gradient of the weight until the backward (it is then
    added to Megatron's `main_grad` where there is one), the hidden gradient of the active rows.

    Args: as for `linear_log_probs`; `inputs` holds one entry per row, the same on every tensor-parallel rank.

    Raises:
        ValueError: shapes do not fit, a tensor is missing, or the implementation cannot run here.
    """
    inputs.check(hidden_RH.shape[0], options)
    head = make_head(
        hidden_RH,
        weight_VH,
        group=tensor_parallel_group,
        vocab_size=vocab_size,
        chunk_rows=chunk_rows,
        logits_dtype=logits_dtype,
        implementation=implementation,
        reduce_hidden_gradient=reduce_hidden_gradient,
        options=options,
    )
    total, log_probs_R, entropy_R, loss_R, flags_R = _LinearPolicyLoss.apply(
        hidden_RH, weight_VH, inputs, options, head, torch.is_grad_enabled()
    )
    return PolicyLossOutput(
        total=total, log_probs=log_probs_R, entropy=entropy_R, loss=loss_R, flags=flags_R, choice=head.choice
    )
