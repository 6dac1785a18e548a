"""The loss as `torch.library` operators, so that torch.compile and opcheck see through it.

`r1reward::policy_loss` is differentiable by its logits. Its parts are operators of their own. Options travel as numbers
(`PolicyLossOptions.pack`), process groups as names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions, TokenInputs, VocabularyShard
from megatron_r1reward.kernels.policy_loss.row_kernels import row_kernels
from megatron_r1reward.kernels.policy_loss.statistics import RowStatistics, gather_parts

SECOND_BACKWARD = (
    "the backward of the policy loss has overwritten its logits with their gradient and cannot run again: "
    "pass overwrite=False to keep the logits"
)


@torch.library.custom_op("r1reward::row_statistics", mutates_args=())
def row_statistics(
    logits: Tensor,
    targets: Tensor,
    read: Tensor,
    first_column: int,
    width: int,
    temperature: float,
    implementation: str,
) -> Tensor:
    """The shard's four numbers per row, float32 [4, R]; see `statistics`."""
    shard = VocabularyShard(start=first_column, width=width)
    return row_kernels(implementation).statistics(logits, targets, read, shard, temperature)


@row_statistics.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(4, logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("r1reward::gather_statistics", mutates_args=())
def gather_statistics(parts: Tensor, ranks: int, group_name: str) -> Tensor:
    """The parts of all tensor-parallel ranks, [ranks, 4, R]; an empty name means one rank."""
    group = _resolve_process_group(group_name) if group_name else None  # type: ignore[arg-type]
    return gather_parts(parts, group).clone()


@gather_statistics.register_fake
def _(parts: Tensor, ranks: int, group_name: str) -> Tensor:
    return parts.new_empty(ranks, *parts.shape)


@torch.library.custom_op("r1reward::rows_loss", mutates_args=())
def rows_loss(
    parts: Tensor,
    read: Tensor,
    targets: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    reference_log_probs: Tensor | None,
    sampler_log_probs: Tensor | None,
    standardization: Tensor | None,
    options: Sequence[float],
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log_probs, entropy, normalizer, loss, grad_log_prob, grad_entropy, flags), [R] each."""
    inputs = TokenInputs(
        targets=targets,
        old_log_probs=old_log_probs,
        advantages=advantages,
        weights=weights,
        reference_log_probs=reference_log_probs,
        sampler_log_probs=sampler_log_probs,
        standardization=standardization,
    )
    rows, loss = row_kernels(implementation).loss(parts, inputs, read, PolicyLossOptions.unpack(options))
    outputs = (rows.log_probs, rows.entropy, rows.normalizer, loss.loss, loss.grad_log_prob, loss.grad_entropy)
    first, second, third, fourth, fifth, sixth = (tensor.clone() for tensor in outputs)  # an output may be no view
    return first, second, third, fourth, fifth, sixth, loss.flags


@rows_loss.register_fake
def _(parts: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = parts.shape[2]
    numbers = [parts.new_empty(rows) for _ in range(6)]
    return (*numbers, parts.new_empty(rows, dtype=torch.int32))


@torch.library.custom_op("r1reward::logit_gradient_", mutates_args=("logits",))
def logit_gradient_(
    logits: Tensor,
    targets: Tensor,
    normalizer: Tensor,
    entropy: Tensor,
    grad_log_prob: Tensor,
    grad_entropy: Tensor,
    first_column: int,
    width: int,
    temperature: float,
    with_entropy: bool,
    implementation: str,
) -> None:
    """Overwrite the logits with their gradient; rows whose coefficients are 0 are only zeroed."""
    row_kernels(implementation).gradient_(
        logits,
        targets,
        RowStatistics(log_probs=normalizer, entropy=entropy, normalizer=normalizer),
        grad_log_prob,
        grad_entropy,
        VocabularyShard(start=first_column, width=width),
        temperature,
        with_entropy=with_entropy,
    )


@torch.library.custom_op("r1reward::policy_loss", mutates_args=())
def policy_loss(
    logits: Tensor,
    targets: Tensor,
    read: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    reference_log_probs: Tensor | None,
    sampler_log_probs: Tensor | None,
    standardization: Tensor | None,
    first_column: int,
    width: int,
    ranks: int,
    group_name: str,
    options: Sequence[float],
    overwrite: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(total, log_probs, entropy, loss, flags, normalizer, grad_log_prob, grad_entropy); gradient only through total.

    `overwrite`: the backward writes the gradient over the logits, and may run once.
    """
    temperature = PolicyLossOptions.unpack(options).temperature
    parts = row_statistics(logits, targets, read, first_column, width, temperature, implementation)
    merged = gather_statistics(parts, ranks, group_name)
    log_probs, entropy, normalizer, loss, grad_log_prob, grad_entropy, flags = rows_loss(
        merged, read, targets, old_log_probs, advantages, weights, reference_log_probs, sampler_log_probs,
        standardization, options, implementation,
    )  # fmt: skip
    return loss.sum(), log_probs, entropy, loss, flags, normalizer, grad_log_prob, grad_entropy


@policy_loss.register_fake
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    rows = logits.shape[0]

    def row(dtype: torch.dtype = torch.float32) -> Tensor:
        return logits.new_empty(rows, dtype=dtype)

    total = logits.new_empty((), dtype=torch.float32)
    return total, row(), row(), row(), row(torch.int32), row(), row(), row()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets = inputs[0], inputs[1]
    ctx.first_column, ctx.width = inputs[9], inputs[10]
    ctx.options, ctx.overwrite, ctx.implementation = inputs[13:16]
    ctx.spent = False
    _, _, entropy, _, _, normalizer, grad_log_prob, grad_entropy = output
    ctx.save_for_backward(logits, targets, normalizer, entropy, grad_log_prob, grad_entropy)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.spent:
        raise RuntimeError(SECOND_BACKWARD)
    ctx.spent = ctx.overwrite
    logits, targets, normalizer, entropy, grad_log_prob, grad_entropy = ctx.saved_tensors
    options = PolicyLossOptions.unpack(ctx.options)
    gradient = logits.detach() if ctx.overwrite else logits.detach().clone()
    scale = upstream.float()
    logit_gradient_(
        gradient, targets, normalizer, entropy, grad_log_prob * scale, grad_entropy * scale, ctx.first_column,
        ctx.width, options.temperature, options.entropy_coefficient != 0.0, ctx.implementation,
    )  # fmt: skip
    return (gradient, *([None] * 15))


policy_loss.register_autograd(_backward, setup_context=_save)
