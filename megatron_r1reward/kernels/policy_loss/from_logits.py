"""`policy_loss_from_logits`: the drop-in loss on materialised, vocab-parallel logits."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_r1reward.kernels import choose_kernel, cuda_library
from megatron_r1reward.kernels.policy_loss import operators
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions, TokenInputs, VocabularyShard
from megatron_r1reward.kernels.policy_loss.token_loss import rows_with_gradient

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PolicyLossOutput:
    """`total` carries the gradient; the rest is detached, float32 [R] but for `flags`."""

    total: torch.Tensor  # float32 [], sum of the weighted token losses; divide ONCE by the global denominator
    log_probs: torch.Tensor  # natural log; 0 for rows that were not read
    entropy: torch.Tensor  # nats; 0 for rows that were not read
    loss: torch.Tensor  # weighted
    flags: torch.Tensor  # int32, see flags.Flag
    choice: choose_kernel.Choice


def policy_loss_from_logits(
    logits_RV: torch.Tensor,
    inputs: TokenInputs,
    options: PolicyLossOptions,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    overwrite: bool = True,
    read_idle_rows: bool = True,
    implementation: str = "auto",
) -> PolicyLossOutput:
    """StableReinforce's loss from this rank's logits, with the gradient written over them in the backward.

    Args:
        logits_RV: float32, bfloat16 or float16 [R, V / tp], columns contiguous, rows may be strided.
        inputs: one entry per row; the same on every tensor-parallel rank.
        group: tensor-parallel group; None: the whole vocabulary is here. One all-gather of 16 bytes per row.
        vocab_size: columns of the whole vocabulary that are no padding; None: all.
        overwrite: write the gradient over the logits (no second [R, V] tensor, one backward only). The logits must not
            be read by anything else afterwards.
        read_idle_rows: False skips rows that cannot have a gradient in the forward, too; their log-probs and entropies
            are then 0. Rows of weight 0 are never read.
        implementation: "auto", or a name of `choose_kernel.TABLE`.

    Raises:
        ValueError: shapes, a missing tensor, or an implementation that cannot handle the request.
    """
    if logits_RV.dim() != 2 or logits_RV.stride(1) != 1:
        raise ValueError(
            f"logits have shape {tuple(logits_RV.shape)} and strides {logits_RV.stride()}: pass [rows, columns] "
            "with contiguous columns"
        )
    inputs.check(logits_RV.shape[0], options)
    if overwrite and logits_RV.is_leaf and logits_RV.requires_grad:
        raise ValueError("logits are a leaf that requires a gradient: pass overwrite=False, or logits made by a layer")
    ranks = 1 if group is None else group.size()
    rank = 0 if group is None else dist.get_rank(group)
    shard = VocabularyShard.of_rank(logits_RV.shape[1], rank, vocab_size)
    request = choose_kernel.request_for(
        logits_RV, padded=shard.width < logits_RV.shape[1], tensor_parallel_size=ranks, options=options
    )
    choice = choose_kernel.choose(request, requested=implementation)
    read_R = inputs.weights != 0 if read_idle_rows else rows_with_gradient(inputs, options)
    if choice.name in choose_kernel.IN_FORWARD:
        if not overwrite:
            raise ValueError(f"implementation {choice.name!r} always overwrites its logits: pass overwrite=True")
        total, log_probs_R, entropy_R, loss_R, flags_R = _InForward.apply(
            logits_RV, inputs, read_R, shard.width, options, choice.name
        )
    else:
        total, log_probs_R, entropy_R, loss_R, flags_R, *_ = operators.policy_loss(
            logits_RV, inputs.targets, read_R, inputs.old_log_probs, inputs.advantages, inputs.weights,
            inputs.reference_log_probs, inputs.sampler_log_probs, inputs.standardization, shard.start, shard.width,
            ranks, group.group_name if group is not None and ranks > 1 else "", options.pack(), overwrite, choice.name,
        )  # fmt: skip
    return PolicyLossOutput(
        total=total, log_probs=log_probs_R, entropy=entropy_R, loss=loss_R, flags=flags_R, choice=choice
    )


class _InForward(torch.autograd.Function):
    """Whole-row kernels: the gradient for upstream 1 is formed in the forward; the backward rescales it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_RV: torch.Tensor,
        inputs: TokenInputs,
        read_R: torch.Tensor,
        width: int,
        options: PolicyLossOptions,
        implementation: str,
    ) -> tuple[torch.Tensor, ...]:
        gradient_RV = logits_RV.detach()
        if implementation == "triton_row":
            launch = importlib.import_module("megatron_r1reward.kernels.policy_loss.triton_launch")
            outputs = launch.row_(gradient_RV, inputs, read_R, width, options)
        else:
            outputs = cuda_library.row_(gradient_RV, inputs, read_R, options)
        log_probs_R, entropy_R, loss_R, has_gradient_R, flags_R = outputs
        ctx.gradient, ctx.has_gradient = gradient_RV, has_gradient_R
        ctx.mark_non_differentiable(log_probs_R, entropy_R, loss_R, flags_R)
        return loss_R.sum(), log_probs_R, entropy_R, loss_R, flags_R

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradient is None:
            raise RuntimeError(operators.SECOND_BACKWARD)
        launch = importlib.import_module("megatron_r1reward.kernels.policy_loss.triton_launch")
        gradient_RV, ctx.gradient = ctx.gradient, None
        launch.rescale_(gradient_RV, ctx.has_gradient, upstream.float())
        return gradient_RV, None, None, None, None, None
