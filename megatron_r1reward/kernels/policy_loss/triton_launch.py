"""Launches of the Triton kernels: tiles from a table, no autotuning, no host synchronisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from megatron_r1reward.kernels.policy_loss.options import (
    FILTERS,
    KL_ESTIMATORS,
    PolicyLossOptions,
    TokenInputs,
    VocabularyShard,
)
from megatron_r1reward.kernels.policy_loss.statistics import LOG2_E, RowStatistics
from megatron_r1reward.kernels.policy_loss.token_loss import TokenLoss
from megatron_r1reward.kernels.policy_loss.triton_gradient import gradient_kernel, rescale_kernel
from megatron_r1reward.kernels.policy_loss.triton_loss import loss_kernel
from megatron_r1reward.kernels.policy_loss.triton_row import row_kernel
from megatron_r1reward.kernels.policy_loss.triton_softmax import statistics_kernel

LOSS_ROWS = 128  # rows of one program of the loss kernel
INTERPRETED = not isinstance(statistics_kernel, triton.runtime.jit.JITFunction)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Columns that one program handles at a time, and its warps."""

    block: int
    warps: int


# The widest tiles that do not spill registers on sm_90 (tests/unit/kernels/test_compile.py holds them to it).
STATISTICS_TILE = Tile(block=8192, warps=8)
GRADIENT_TILE = Tile(block=8192, warps=8)
ROW_TILE = Tile(block=16384, warps=16)


def _block(tile: Tile, columns: int) -> int:
    return min(tile.block, max(16, triton.next_power_of_2(columns)))


def loss_arguments(options: PolicyLossOptions) -> tuple[float, ...]:
    """The scalar arguments of `row_loss`, in order."""
    cap = options.importance_cap
    return (options.filter_sigma, *options.log_bounds, cap, options.kl_coefficient, options.entropy_coefficient)


def loss_switches(options: PolicyLossOptions, inputs: TokenInputs) -> dict[str, int | bool]:
    """The compile-time arguments of the kernels that contain `row_loss`."""
    return {
        "FILTER": FILTERS.index(options.filter),
        "KL": KL_ESTIMATORS.index(options.kl_estimator) + 1 if options.kl_coefficient != 0.0 else 0,
        "IMPORTANCE": math.isfinite(options.importance_cap),
        "STANDARDIZE": inputs.standardization is not None,
    }


def row_statistics(
    logits_RV: torch.Tensor,
    targets_R: torch.Tensor,
    read_R: torch.Tensor,
    shard: VocabularyShard,
    temperature: float,
) -> torch.Tensor:
    """Arguments and result as in `torch_rows.row_statistics`."""
    rows = logits_RV.shape[0]
    parts_4R = torch.empty(4, rows, dtype=torch.float32, device=logits_RV.device)
    if rows:
        statistics_kernel[(rows,)](
            logits_RV, logits_RV.stride(0), targets_R, read_R, parts_4R, rows, shard.width, shard.start,
            LOG2_E / temperature, BLOCK=_block(STATISTICS_TILE, shard.width), ENTROPY=True,
            num_warps=STATISTICS_TILE.warps,
        )  # fmt: skip
    return parts_4R


def rows_loss(
    parts_T4R: torch.Tensor, inputs: TokenInputs, read_R: torch.Tensor, options: PolicyLossOptions
) -> tuple[RowStatistics, TokenLoss]:
    """Merge the ranks' parts and evaluate the loss."""
    ranks, _, rows = parts_T4R.shape
    outputs_6R = torch.empty(6, rows, dtype=torch.float32, device=parts_T4R.device)
    flags_R = torch.empty(rows, dtype=torch.int32, device=parts_T4R.device)
    log_probs_R, entropy_R, loss_R, grad_log_prob_R, grad_entropy_R, normalizer_R = outputs_6R.unbind()
    if rows:
        loss_kernel[(triton.cdiv(rows, LOSS_ROWS),)](
            parts_T4R, ranks, rows, *_row_pointers(inputs), read_R,
            log_probs_R, entropy_R, loss_R, grad_log_prob_R, grad_entropy_R, normalizer_R, flags_R,
            *loss_arguments(options), **loss_switches(options, inputs), BLOCK=LOSS_ROWS, num_warps=4,
        )  # fmt: skip
    return (
        RowStatistics(log_probs=log_probs_R, entropy=entropy_R, normalizer=normalizer_R),
        TokenLoss(loss=loss_R, grad_log_prob=grad_log_prob_R, grad_entropy=grad_entropy_R, flags=flags_R),
    )


def _row_pointers(inputs: TokenInputs) -> tuple[torch.Tensor, ...]:
    """Pointer arguments; where an optional tensor is missing, one that is never dereferenced stands in."""
    present = inputs.weights
    return (
        inputs.old_log_probs,
        inputs.advantages,
        inputs.weights,
        present if inputs.reference_log_probs is None else inputs.reference_log_probs,
        present if inputs.sampler_log_probs is None else inputs.sampler_log_probs,
        present if inputs.standardization is None else inputs.standardization,
    )


def logit_gradient_(
    logits_RV: torch.Tensor,
    targets_R: torch.Tensor,
    normalizer_R: torch.Tensor,
    entropy_R: torch.Tensor,
    grad_log_prob_R: torch.Tensor,
    grad_entropy_R: torch.Tensor,
    shard: VocabularyShard,
    temperature: float,
    *,
    with_entropy: bool,
) -> None:
    """Arguments and effect as in `torch_rows.logit_gradient_`."""
    rows, padded_columns = logits_RV.shape
    if rows:
        gradient_kernel[(rows,)](
            logits_RV, logits_RV.stride(0), targets_R, normalizer_R, entropy_R,
            grad_log_prob_R, grad_entropy_R, shard.width, padded_columns, shard.start,
            LOG2_E / temperature, 1.0 / temperature, BLOCK=_block(GRADIENT_TILE, padded_columns),
            ENTROPY=with_entropy, num_warps=GRADIENT_TILE.warps,
        )  # fmt: skip


def row_(
    logits_RV: torch.Tensor, inputs: TokenInputs, read_R: torch.Tensor, width: int, options: PolicyLossOptions
) -> tuple[torch.Tensor, ...]:
    """One launch over all rows: overwrites the logits with their gradient.

    Returns (log_probs, entropy, loss, has_gradient int8, flags).
    """
    rows, padded_columns = logits_RV.shape
    log_probs_R, entropy_R, loss_R = torch.empty(3, rows, dtype=torch.float32, device=logits_RV.device).unbind()
    has_gradient_R = torch.empty(rows, dtype=torch.int8, device=logits_RV.device)
    flags_R = torch.empty(rows, dtype=torch.int32, device=logits_RV.device)
    if rows:
        row_kernel[(rows,)](
            logits_RV, logits_RV.stride(0), inputs.targets, read_R, *_row_pointers(inputs),
            log_probs_R, entropy_R, loss_R, has_gradient_R, flags_R, width, padded_columns,
            LOG2_E / options.temperature, 1.0 / options.temperature,
            *loss_arguments(options), **loss_switches(options, inputs),
            ENTROPY=options.entropy_coefficient != 0.0, BLOCK=_block(ROW_TILE, padded_columns),
            num_warps=ROW_TILE.warps,
        )  # fmt: skip
    return log_probs_R, entropy_R, loss_R, has_gradient_R, flags_R


def rescale_(gradient_RV: torch.Tensor, has_gradient_R: torch.Tensor, upstream: torch.Tensor) -> None:
    """Multiply the rows that have a gradient by `upstream`, a float32 scalar tensor on the device."""
    rows, columns = gradient_RV.shape
    if rows:
        rescale_kernel[(rows,)](
            gradient_RV, gradient_RV.stride(0), has_gradient_R, upstream, columns,
            BLOCK=_block(GRADIENT_TILE, columns), num_warps=GRADIENT_TILE.warps,
        )  # fmt: skip
