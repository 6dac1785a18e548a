"""The row kernels in Triton: tiles from a table, no autotuning, no host synchronisation.

CUDA tensors, or CPU tensors under the interpreter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton

from megatron_r1reward.kernels.policy_loss.row_kernels import (
    KL_ESTIMATORS,
    LOG2_E,
    LogitRows,
    PolicyLossOptions,
    RowStatistics,
    TokenInputs,
    TokenLoss,
    WholeRowLoss,
)
from megatron_r1reward.kernels.policy_loss.triton_gradient import gradient_kernel
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


def statistics(rows: LogitRows) -> torch.Tensor:
    """See `RowKernels.statistics`."""
    logits_RV, number = rows.logits, len(rows.logits)
    parts_4R = torch.empty(4, number, dtype=torch.float32, device=logits_RV.device)
    if number:
        statistics_kernel[(number,)](
            logits_RV, logits_RV.stride(0), rows.targets, parts_4R, number, rows.shard.width, rows.shard.start,
            LOG2_E / rows.temperature, BLOCK=_block(STATISTICS_TILE, rows.shard.width),
            num_warps=STATISTICS_TILE.warps,
        )  # fmt: skip
    return parts_4R


def loss(parts_T4R: torch.Tensor, inputs: TokenInputs, options: PolicyLossOptions) -> tuple[RowStatistics, TokenLoss]:
    """See `RowKernels.loss`."""
    ranks, _, number = parts_T4R.shape
    outputs_6R = torch.empty(6, number, dtype=torch.float32, device=parts_T4R.device)
    flags_R = torch.empty(number, dtype=torch.int32, device=parts_T4R.device)
    log_probs_R, entropy_R, loss_R, grad_log_prob_R, grad_entropy_R, normalizer_R = outputs_6R.unbind()
    if number:
        loss_kernel[(triton.cdiv(number, LOSS_ROWS),)](
            parts_T4R, ranks, number, *_row_pointers(inputs),
            log_probs_R, entropy_R, loss_R, grad_log_prob_R, grad_entropy_R, normalizer_R, flags_R,
            *_scalars(options), **_switches(options), BLOCK=LOSS_ROWS, num_warps=4,
        )  # fmt: skip
    return (
        RowStatistics(log_probs=log_probs_R, entropy=entropy_R, normalizer=normalizer_R),
        TokenLoss(loss=loss_R, grad_log_prob=grad_log_prob_R, grad_entropy=grad_entropy_R, flags=flags_R),
    )


def gradient_(
    rows: LogitRows,
    statistics: RowStatistics,
    grad_log_prob_R: torch.Tensor,
    grad_entropy_R: torch.Tensor | None,
) -> None:
    """See `RowKernels.gradient_`."""
    logits_RV = rows.logits
    number, padded_columns = logits_RV.shape
    if number:
        gradient_kernel[(number,)](
            logits_RV, logits_RV.stride(0), rows.targets, statistics.normalizer, statistics.entropy,
            grad_log_prob_R, grad_log_prob_R if grad_entropy_R is None else grad_entropy_R,
            rows.shard.width, padded_columns, rows.shard.start,
            LOG2_E / rows.temperature, 1.0 / rows.temperature, BLOCK=_block(GRADIENT_TILE, padded_columns),
            ENTROPY=grad_entropy_R is not None, num_warps=GRADIENT_TILE.warps,
        )  # fmt: skip


def whole_rows_(rows: LogitRows, inputs: TokenInputs, options: PolicyLossOptions) -> WholeRowLoss:
    """See `WholeRowKernel`."""
    logits_RV = rows.logits
    number, padded_columns = logits_RV.shape
    log_probs_R, entropy_R, loss_R = torch.empty(3, number, dtype=torch.float32, device=logits_RV.device).unbind()
    has_gradient_R = torch.empty(number, dtype=torch.int8, device=logits_RV.device)
    flags_R = torch.empty(number, dtype=torch.int32, device=logits_RV.device)
    if number:
        row_kernel[(number,)](
            logits_RV, logits_RV.stride(0), rows.targets, *_row_pointers(inputs),
            log_probs_R, entropy_R, loss_R, has_gradient_R, flags_R, rows.shard.width, padded_columns,
            LOG2_E / rows.temperature, 1.0 / rows.temperature, *_scalars(options), **_switches(options),
            ENTROPY=options.entropy_coefficient != 0.0, BLOCK=_block(ROW_TILE, padded_columns),
            num_warps=ROW_TILE.warps,
        )  # fmt: skip
    return WholeRowLoss(
        log_probs=log_probs_R, entropy=entropy_R, loss=loss_R, has_gradient=has_gradient_R.bool(), flags=flags_R
    )


def _block(tile: Tile, columns: int) -> int:
    return min(tile.block, max(16, triton.next_power_of_2(columns)))


def _scalars(options: PolicyLossOptions) -> tuple[float, ...]:
    """The scalar arguments of `row_loss`, in order."""
    terms = (options.importance_cap, options.kl_coefficient, options.kl_bound, options.entropy_coefficient)
    return (*options.log_bounds, *terms)


def _switches(options: PolicyLossOptions) -> dict[str, int | bool]:
    """The compile-time arguments of the kernels that contain `row_loss`."""
    return {
        "KL": KL_ESTIMATORS.index(options.kl_estimator) + 1 if options.kl_coefficient != 0.0 else 0,
        "IMPORTANCE": math.isfinite(options.importance_cap),
    }


def _row_pointers(inputs: TokenInputs) -> tuple[torch.Tensor, ...]:
    """Pointer arguments; where an optional tensor is missing, one that is never dereferenced stands in."""
    present = inputs.weights
    return (
        inputs.old_log_probs,
        inputs.advantages,
        inputs.weights,
        present if inputs.reference_log_probs is None else inputs.reference_log_probs,
        present if inputs.sampler_log_probs is None else inputs.sampler_log_probs,
    )
