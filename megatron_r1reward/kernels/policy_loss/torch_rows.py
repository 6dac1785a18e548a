"""The row kernels in plain torch, a few rows at a time: any device, and what the Triton and CUDA kernels must equal.

Temporaries hold one tile (TILE_ELEMENTS float32 numbers, small enough for a CPU's cache), whatever the size of the
logits. The loss is written in closed form; `algorithm.policy_loss` stays the truth, and a test compares both on every
branch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from megatron_r1reward.kernels.policy_loss.row_kernels import (
    LN_2,
    LOG2_E,
    Flag,
    LogitRows,
    PolicyLossOptions,
    RowStatistics,
    TokenInputs,
    TokenLoss,
    VocabularyShard,
)

TILE_ELEMENTS = 1 << 18  # 1 MiB of float32
FLOOR = -1e4  # 2^-1e4 is 0 in float32 and -1e4 * 0 is 0, where -inf * 0 would be NaN


def statistics(rows: LogitRows) -> torch.Tensor:
    """See `RowKernels.statistics`."""
    parts_4R = torch.zeros(4, len(rows.logits), dtype=torch.float32, device=rows.logits.device)
    if rows.shard.width == 0:
        parts_4R[[0, 3]] = -torch.inf
        return parts_4R
    column_R, here_R = _local_columns(rows.targets, rows.shard)
    for tile in _tiles(rows.logits):
        z_CV = _scaled(rows, tile)
        target_C = z_CV.gather(1, column_R[tile, None]).squeeze(1)
        peak_C = z_CV.amax(dim=-1)
        z_CV.sub_(torch.where(peak_C == -torch.inf, 0.0, peak_C)[:, None]).clamp_(min=FLOOR)
        power_CV = z_CV.exp2()
        parts_4R[0, tile], parts_4R[1, tile] = peak_C, power_CV.sum(-1)
        parts_4R[2, tile] = power_CV.mul_(z_CV).sum(-1)
        parts_4R[3, tile] = torch.where(here_R[tile], target_C, -torch.inf)
    return parts_4R


def loss(parts_T4R: torch.Tensor, inputs: TokenInputs, options: PolicyLossOptions) -> tuple[RowStatistics, TokenLoss]:
    """See `RowKernels.loss`."""
    merged = merge_parts(parts_T4R)
    return merged, token_loss(merged.log_probs, merged.entropy, inputs, options)


def gradient_(
    rows: LogitRows,
    statistics: RowStatistics,
    grad_log_prob_R: torch.Tensor,
    grad_entropy_R: torch.Tensor | None,
) -> None:
    """See `RowKernels.gradient_`."""
    has_gradient_R = grad_log_prob_R != 0
    if grad_entropy_R is not None:
        has_gradient_R = has_gradient_R | (grad_entropy_R != 0)
    logits_RV, shard, temperature = rows.logits, rows.shard, rows.temperature
    column_R, here_R = _local_columns(rows.targets, shard)
    if shard.width:
        for tile in _tiles(logits_RV, has_gradient_R):
            log2_p_CV = _scaled(rows, tile).sub_(statistics.normalizer[tile, None])
            grad_a_C = grad_log_prob_R[tile] / temperature
            if grad_entropy_R is not None:
                p_CV = log2_p_CV.exp2()
                slope_C = grad_entropy_R[tile] / temperature
                # The bracket g_a + g_b (ln p + H), as an affine function of log2 p.
                log2_p_CV.clamp_(min=FLOOR).mul_((slope_C * LN_2)[:, None])
                log2_p_CV.add_((grad_a_C + slope_C * statistics.entropy[tile])[:, None])
                grad_CV = log2_p_CV.mul_(p_CV).neg_()
            else:
                grad_CV = log2_p_CV.exp2_().mul_(-grad_a_C[:, None])
            grad_CV.scatter_add_(1, column_R[tile, None], torch.where(here_R[tile], grad_a_C, 0.0)[:, None])
            logits_RV[tile, : shard.width] = grad_CV.to(logits_RV.dtype)
    logits_RV[:, shard.width :] = 0
    idle_R = (~has_gradient_R).nonzero().squeeze(1)
    if len(idle_R):
        logits_RV.index_fill_(0, idle_R, 0)


def merge_parts(parts_T4R: torch.Tensor) -> RowStatistics:
    """Statistics of the whole row. Every rank adds in rank order, so all ranks get the same bits.

    A row without any finite logit gives log-prob and entropy NaN.
    """
    peak_R, total_R, weighted_R, target_R = parts_T4R[0].unbind()
    for part_4R in parts_T4R[1:]:
        other_peak_R, other_total_R, other_weighted_R, other_target_R = part_4R.unbind()
        merged_R = torch.maximum(peak_R, other_peak_R)
        shift_R, other_shift_R = _shift(peak_R, merged_R), _shift(other_peak_R, merged_R)
        scale_R, other_scale_R = _scale(peak_R, shift_R), _scale(other_peak_R, other_shift_R)
        weighted_R = scale_R * (weighted_R + total_R * shift_R)
        weighted_R = weighted_R + other_scale_R * (other_weighted_R + other_total_R * other_shift_R)
        total_R = scale_R * total_R + other_scale_R * other_total_R
        peak_R, target_R = merged_R, torch.maximum(target_R, other_target_R)
    normalizer_R = peak_R + total_R.log2()
    return RowStatistics(
        log_probs=(target_R - normalizer_R) * LN_2,
        entropy=(total_R.log2() - weighted_R / total_R) * LN_2,
        normalizer=normalizer_R,
    )


def usable_advantages(inputs: TokenInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages with 0 where they are not finite, where that is so): float32 [R], bool [R]. Rows of weight 0 are
    neither."""
    carries_R = inputs.weights != 0
    advantage_R = torch.where(carries_R, inputs.advantages, 0.0)
    rejected_R = ~advantage_R.isfinite()
    return torch.where(rejected_R, 0.0, advantage_R), rejected_R


def rows_with_gradient(inputs: TokenInputs, options: PolicyLossOptions) -> torch.Tensor:
    """Rows that may receive a gradient, known before any logit: bool [R].

    A row is left out when its weight is 0, or when its advantage is 0 or not finite and no KL or entropy term reaches
    it.
    """
    if options.every_row_has_gradient:
        return inputs.weights != 0
    return usable_advantages(inputs)[0] != 0


def idle_flags(inputs: TokenInputs) -> torch.Tensor:
    """ACTIVE and REJECTED of every row, int32 [R]: all that is known of a row whose logits were not computed."""
    rejected_R = usable_advantages(inputs)[1]
    return (inputs.weights != 0).int() * int(Flag.ACTIVE) + rejected_R.int() * int(Flag.REJECTED)


def token_loss(
    log_probs_R: torch.Tensor, entropy_R: torch.Tensor, inputs: TokenInputs, options: PolicyLossOptions
) -> TokenLoss:
    """The weighted loss of each row and its derivatives by log-prob and entropy.

    A row without a usable advantage contributes nothing to the policy term; KL and entropy terms reach every row whose
    weight is not 0. NaN log-probs of such rows propagate and set NON_FINITE.
    """
    carries_R = inputs.weights != 0
    zero = torch.zeros_like(log_probs_R)
    # Select on the inputs: a product with a mask would keep 0 * inf = NaN.
    log_probs_R, entropy_R, old_R, weight_R = (
        torch.where(carries_R, x.float(), zero) for x in (log_probs_R, entropy_R, inputs.old_log_probs, inputs.weights)
    )
    advantage_R, rejected_R = usable_advantages(inputs)
    scaled_R = advantage_R
    if math.isfinite(options.importance_cap):
        assert inputs.sampler_log_probs is not None
        gap_R = old_R - torch.where(carries_R, inputs.sampler_log_probs, zero)
        scaled_R = advantage_R * gap_R.exp().clamp(max=options.importance_cap)
    signal_R = (advantage_R != 0) & (scaled_R != 0)
    scaled_R = torch.where(signal_R, scaled_R, zero)
    log_ratio_R = torch.where(signal_R, log_probs_R - old_R, zero)

    pre_low, pre_high, clip_low, clip_high, dual = options.log_bounds
    below_R, above_R = log_ratio_R < pre_low, log_ratio_R > pre_high
    log_ratio_R = log_ratio_R.clamp(pre_low, pre_high)
    negative_R, positive_R = scaled_R < 0, scaled_R > 0
    clipped_low_R = negative_R & (log_ratio_R < clip_low)
    clipped_high_R = (positive_R & (log_ratio_R > clip_high)) | (negative_R & (log_ratio_R > dual))
    log_ratio_R = torch.where(clipped_low_R, clip_low, log_ratio_R)
    log_ratio_R = torch.where(clipped_high_R, torch.where(positive_R, clip_high, dual), log_ratio_R)
    loss_R = torch.where(signal_R, -log_ratio_R.exp() * scaled_R, zero)
    grad_R = torch.where(below_R | above_R | clipped_low_R | clipped_high_R, zero, loss_R)

    if options.kl_coefficient != 0.0:
        assert inputs.reference_log_probs is not None
        kl_R, kl_grad_R = _kl(log_probs_R - torch.where(carries_R, inputs.reference_log_probs, zero), options)
        loss_R, grad_R = loss_R + options.kl_coefficient * kl_R, grad_R + options.kl_coefficient * kl_grad_R
    loss_R = loss_R - options.entropy_coefficient * entropy_R if options.entropy_coefficient else loss_R
    loss_R = torch.where(carries_R, loss_R * weight_R, zero)
    grad_R = torch.where(carries_R, grad_R * weight_R, zero)
    flags_R = carries_R.int() * int(Flag.ACTIVE) + rejected_R.int() * int(Flag.REJECTED)
    flags_R = flags_R + below_R.int() * int(Flag.PRECLIPPED_LOW) + above_R.int() * int(Flag.PRECLIPPED_HIGH)
    flags_R = flags_R + clipped_low_R.int() * int(Flag.CLIPPED_LOW) + clipped_high_R.int() * int(Flag.CLIPPED_HIGH)
    broken_R = ~(loss_R.isfinite() & grad_R.isfinite())
    return TokenLoss(
        loss=loss_R,
        grad_log_prob=grad_R,
        grad_entropy=-options.entropy_coefficient * weight_R,
        flags=flags_R + broken_R.int() * int(Flag.NON_FINITE),
    )


def _kl(gap_R: torch.Tensor, options: PolicyLossOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimate and its derivative by the log-prob, [R] each, of gap = log_prob - reference."""
    match options.kl_estimator:
        case "k1":
            return gap_R, torch.ones_like(gap_R)
        case "k2":
            return 0.5 * gap_R.square(), gap_R
        case "k3":
            excess_R = (-gap_R).expm1()
            value_R = excess_R + gap_R
            bounded_R = value_R > options.kl_bound
            return value_R.clamp(max=options.kl_bound), torch.where(bounded_R, 0.0, -excess_R)


def _shift(peak_R: torch.Tensor, merged_R: torch.Tensor) -> torch.Tensor:
    """peak - merged, and 0 where the shard has no finite logit (-inf - -inf would be NaN)."""
    return torch.where(peak_R == -math.inf, 0.0, peak_R - merged_R)


def _scale(peak_R: torch.Tensor, shift_R: torch.Tensor) -> torch.Tensor:
    return torch.where(peak_R == -math.inf, 0.0, shift_R.exp2())


def _local_columns(targets_R: torch.Tensor, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target within the shard (0 where it lies elsewhere) and whether it lies here."""
    column_R = targets_R - shard.start
    here_R = (column_R >= 0) & (column_R < shard.width)
    return torch.where(here_R, column_R, 0), here_R


def _tiles(logits_RV: torch.Tensor, read_R: torch.Tensor | None = None) -> Iterator[slice | torch.Tensor]:
    """Rows to read, tile by tile: slices where all rows are read, index lists where some are left out."""
    size = max(1, TILE_ELEMENTS // max(1, logits_RV.shape[1]))
    rows = logits_RV.shape[0]
    if read_R is None or bool(read_R.all()):
        yield from (slice(start, min(start + size, rows)) for start in range(0, rows, size))
        return
    yield from read_R.nonzero().squeeze(1).split(size) if bool(read_R.any()) else ()


def _scaled(rows: LogitRows, tile: slice | torch.Tensor) -> torch.Tensor:
    """A fresh float32 tile in the log2 domain."""
    return rows.logits[tile, : rows.shard.width].float().mul(LOG2_E / rows.temperature)
