"""LM head and StableReinforce loss in one operation; the gradients are formed in the forward, chunk by chunk.

    rows that can have a gradient -> hidden @ head^T = logits of one chunk
        -> row kernels: statistics -> all-gather -> loss -> gradient over the logits      (any tensor parallelism)
        or a whole-row kernel, which does the three in one launch                         (the whole vocabulary is here)
    -> gradient @ head, gradient^T @ hidden

Only rows that can receive a gradient are gathered and multiplied: 6 rho R H V operations for a share rho of such rows,
where a backward that recomputes the logits needs 8 rho and one that multiplies all rows 6. No [rows, vocabulary] tensor
exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1reward.kernels.lm_head import (
    Head,
    HeadOptions,
    add_weight_gradient_,
    autograd_weight_gradient,
    takes_main_grad,
)
from megatron_r1reward.kernels.policy_loss.row_kernels import LogitRows, PolicyLossOptions, TokenInputs, WholeRowLoss
from megatron_r1reward.kernels.policy_loss.torch_rows import idle_flags, rows_with_gradient

SECOND_BACKWARD = "linear_policy_loss has handed out its gradients: its backward runs once. Call the forward again"


@dataclass(frozen=True, kw_only=True)
class PolicyLossOutput:
    """`total` carries the gradient; the rest is detached, float32 [R] but for `flags`."""

    total: torch.Tensor  # float32 [], sum of the weighted token losses; divide ONCE by the global denominator
    log_probs: torch.Tensor  # natural log; 0 for rows that were not read
    entropy: torch.Tensor  # nats; 0 for rows that were not read
    loss: torch.Tensor  # weighted
    flags: torch.Tensor  # int32, see row_kernels.Flag


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
        flags_R = idle_flags(inputs)
        buffer_KV = head.buffer(hidden_AH, weight_VH)
        for here in head.chunks(len(rows_A)):
            chunk_CH, chunk = hidden_AH[here], active.take(here)
            logits = head.logits(chunk_CH, weight_VH, chunk.targets, buffer_KV)
            result, grad_logits_LV, live_L = loss_and_gradient_(head, logits, chunk, options, with_gradient)
            results_3R[:, rows_A[here]] = torch.stack([result.log_probs, result.entropy, result.loss])
            flags_R[rows_A[here]] = result.flags
            if not with_gradient:
                continue
            chunk_LH = chunk_CH if live_L is None else chunk_CH[live_L]
            grad_logits_LV = grad_logits_LV.to(weight_VH.dtype)
            if grad_hidden_AH is not None:
                grad_hidden_AH[here if live_L is None else here.start + live_L] = grad_logits_LV @ weight_VH
            if grad_weight_VH is not None:
                add_weight_gradient_(grad_weight_VH, grad_logits_LV, chunk_LH)
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


def loss_and_gradient_(
    head: Head, logits: LogitRows, inputs: TokenInputs, options: PolicyLossOptions, with_gradient: bool = True
) -> tuple[WholeRowLoss, torch.Tensor, torch.Tensor | None]:
    """The loss of a chunk's rows, the gradient over the logits of those that have one, and which these are: [L, V / tp]
    and int64 [L], or None where all have one. Clipped tokens have none: one copy saves two products of a row."""
    if with_gradient and head.whole_row is not None:
        result = head.whole_row(logits, inputs, options)
        live_L = result.has_gradient.nonzero().squeeze(1)
        if len(live_L) == len(inputs.targets):
            return result, logits.logits, None
        return result, logits.logits[live_L], live_L
    merged, loss = head.kernels.loss(head.gather(head.kernels.statistics(logits)), inputs, options)
    has_gradient_C = (loss.grad_log_prob != 0) | (loss.grad_entropy != 0)
    result = WholeRowLoss(
        log_probs=merged.log_probs,
        entropy=merged.entropy,
        loss=loss.loss,
        has_gradient=has_gradient_C,
        flags=loss.flags,
    )
    if not with_gradient:
        return result, logits.logits, None
    live_L = has_gradient_C.nonzero().squeeze(1)
    everything = len(live_L) == len(inputs.targets)
    slopes = loss.grad_log_prob, loss.grad_entropy
    if not everything:
        logits, merged, slopes = logits.take(live_L), merged.take(live_L), (slopes[0][live_L], slopes[1][live_L])
    head.kernels.gradient_(logits, merged, slopes[0], slopes[1] if options.entropy_coefficient else None)
    return result, logits.logits, None if everything else live_L


def linear_policy_loss(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    inputs: TokenInputs,
    options: PolicyLossOptions,
    *,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    head_options: HeadOptions = HeadOptions(),  # noqa: B008 (frozen)
) -> PolicyLossOutput:
    """The loss of R rows from their hidden states.

    Rows that cannot receive a gradient (weight 0; or advantage 0 or not finite, and no KL or entropy term) are not
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
    head = Head.of_call(hidden_RH, weight_VH, tensor_parallel_group, head_options, options)
    total, log_probs_R, entropy_R, loss_R, flags_R = _LinearPolicyLoss.apply(
        hidden_RH, weight_VH, inputs, options, head, torch.is_grad_enabled()
    )
    return PolicyLossOutput(total=total, log_probs=log_probs_R, entropy=entropy_R, loss=loss_R, flags=flags_R)
