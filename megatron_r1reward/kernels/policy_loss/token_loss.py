"""Loss, its two gradient coefficients and flags per row, in closed form and plain torch.

The formulas are those of `algorithm.policy_loss`, which stays the truth: a test compares both on every branch. The
coefficients are g_a = d loss / d log-prob and g_b = d loss / d entropy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_r1reward.kernels.policy_loss.flags import Flag
from megatron_r1reward.kernels.policy_loss.options import PolicyLossOptions, TokenInputs

# Constants of the released code's filter, as in algorithm.advantages.
RELEASED_HALF_WIDTH = 3.0
RELEASED_BOUND = 10.0


@dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """[R] each, float32 but for `flags`; rows with weight 0 hold exact zeros."""

    loss: torch.Tensor  # weighted
    grad_log_prob: torch.Tensor
    grad_entropy: torch.Tensor
    flags: torch.Tensor  # int32, see Flag


def standardized_advantages(inputs: TokenInputs, options: PolicyLossOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages with 0 where rejected, rejected): float32 [R], bool [R]. Rows with weight 0 are neither."""
    carries_R = inputs.weights != 0
    z_R = torch.where(carries_R, inputs.advantages.float(), 0.0)
    mean: torch.Tensor | float = 0.0
    if inputs.standardization is not None:
        mean, inverse_std = inputs.standardization.float().unbind()
        z_R = torch.where(carries_R, (z_R - mean) * inverse_std, 0.0)
    rejected_R = ~z_R.isfinite()
    if options.filter == "paper":
        rejected_R |= z_R.abs() > options.filter_sigma
    elif options.filter == "released_code":
        rejected_R |= (z_R < mean - RELEASED_HALF_WIDTH) | (z_R > mean + RELEASED_HALF_WIDTH)
        rejected_R |= z_R.abs() > RELEASED_BOUND
    rejected_R &= carries_R
    return torch.where(rejected_R, 0.0, z_R), rejected_R


def rows_with_gradient(inputs: TokenInputs, options: PolicyLossOptions) -> torch.Tensor:
    """Rows that may receive a gradient, known before any logit: bool [R].

    A row is left out when its weight is 0, or when its advantage is 0 or rejected and no KL or entropy term reaches it.
    """
    carries_R = inputs.weights != 0
    if options.every_row_has_gradient:
        return carries_R
    return carries_R & (standardized_advantages(inputs, options)[0] != 0)


def idle_flags(inputs: TokenInputs, options: PolicyLossOptions) -> torch.Tensor:
    """ACTIVE and FILTERED of every row, int32 [R]: all that is known of a row whose logits were not computed."""
    rejected_R = standardized_advantages(inputs, options)[1]
    return (inputs.weights != 0).int() * int(Flag.ACTIVE) + rejected_R.int() * int(Flag.FILTERED)


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
    advantage_R, rejected_R = standardized_advantages(inputs, options)
    scaled_R = advantage_R
    if math.isfinite(options.importance_cap):
        assert inputs.sampler_log_probs is not None
        gap_R = old_R - torch.where(carries_R, inputs.sampler_log_probs.float(), zero)
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
        kl_R, kl_grad_R = _kl(log_probs_R, torch.where(carries_R, inputs.reference_log_probs.float(), zero), options)
        loss_R, grad_R = loss_R + options.kl_coefficient * kl_R, grad_R + options.kl_coefficient * kl_grad_R
    loss_R = loss_R - options.entropy_coefficient * entropy_R if options.entropy_coefficient else loss_R
    loss_R = torch.where(carries_R, loss_R * weight_R, zero)
    grad_R = torch.where(carries_R, grad_R * weight_R, zero)
    flags_R = carries_R.int() * int(Flag.ACTIVE) + rejected_R.int() * int(Flag.FILTERED)
    flags_R = flags_R + below_R.int() * int(Flag.PRECLIPPED_LOW) + above_R.int() * int(Flag.PRECLIPPED_HIGH)
    flags_R = flags_R + clipped_low_R.int() * int(Flag.CLIPPED_LOW) + clipped_high_R.int() * int(Flag.CLIPPED_HIGH)
    broken_R = ~(loss_R.isfinite() & grad_R.isfinite())
    return TokenLoss(
        loss=loss_R,
        grad_log_prob=grad_R,
        grad_entropy=-options.entropy_coefficient * weight_R,
        flags=flags_R + broken_R.int() * int(Flag.NON_FINITE),
    )


def _kl(
    log_probs_R: torch.Tensor, reference_R: torch.Tensor, options: PolicyLossOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimate and its derivative by the log-prob, [R] each."""
    gap_R = log_probs_R - reference_R
    match options.kl_estimator:
        case "k1":
            return gap_R, torch.ones_like(gap_R)
        case "k2":
            return 0.5 * gap_R.square(), gap_R
        case "k3":
            excess_R = (-gap_R).expm1()
            return excess_R + gap_R, -excess_R
