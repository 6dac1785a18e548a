"""The clipped policy-gradient loss with Pre-CLIP, per token, how tokens add up to one number, and the gap between the
engine that samples and the engine that trains: measured, and corrected for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_r1reward.algorithm.returns import response_lengths
from megatron_r1reward.config.schema import AlgorithmSection

KlEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True)
class PolicyLossResult:
    """Loss of each response token, [R] each; everything but the loss is detached and serves the metrics.

    A token is *active* when its advantage is finite and not 0 and its importance weight is not 0. On inactive tokens
    the masks are False and the ratio is 1.
    """

    per_token_loss: Tensor  # float, dtype of log_probs; carries the gradient
    ratio: Tensor  # float, rho after Pre-CLIP
    preclipped_low: Tensor  # bool, log-ratio below ln preclip_min
    preclipped_high: Tensor  # bool, log-ratio above ln preclip_max
    clipped_low: Tensor  # bool, rho < 1 - clip_low and A < 0
    clipped_high: Tensor  # bool, rho > 1 + clip_high and A > 0, or rho > dual_clip and A < 0


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """How per-token losses become the batch loss: sum_R(weights * loss) / sum_N(counts).

    Both sums run over the *global* batch, and the caller divides ONCE, by the global denominator. Never divide within a
    micro-batch or a rank: any split of the sequences then gives the same loss and the same gradient.
    """

    weights: Tensor  # float32 [R]
    counts: Tensor  # float32 [N], what each sequence adds to the denominator


def policy_loss(
    log_probs_R: Tensor,
    old_log_probs_R: Tensor,
    advantages_R: Tensor,
    config: AlgorithmSection,
    *,
    importance_weights_R: Tensor | None = None,
    entropy_R: Tensor | None = None,
    reference_log_probs_R: Tensor | None = None,
) -> PolicyLossResult:
    """StableReinforce's objective per token (paper Alg. 1): -min(rho * A, clip(rho, 1 - eps_lo, 1 + eps_hi) * A) with
    rho = exp(clamp(log_prob - old_log_prob, ln preclip_min, ln preclip_max)).

    Every clip bounds rho on a side that the sign of A decides, so -min(...) is a clamp of the log-ratio, too:

        A > 0:  rho <= 1 + eps_hi
        A < 0:  rho >= 1 - eps_lo, and rho <= dual_clip where that is set

    Clamping before exp makes the gradient exactly zero outside the bounds and never forms an infinity there. A token
    with a zero or non-finite advantage contributes exactly 0 loss and 0 gradient, whatever its log-probs are. A NaN
    log-ratio of an active token propagates.

    The entropy bonus, -entropy_coefficient * entropy, and the KL term, kl_loss_coefficient * `kl_estimate`, apply to
    every token, also to those without an advantage.

    Args:
        log_probs_R: float [R], natural log, with gradient.
        old_log_probs_R: float [R], of the policy that the update started from.
        advantages_R: float [R].
        importance_weights_R: float [R] >= 0, `truncated_importance_weights`; multiplies the loss.
        entropy_R: float [R], nats, with gradient; needed when `config.entropy_coefficient` is not 0.
        reference_log_probs_R: float [R]; needed when `config.kl_loss_coefficient` is not 0.

    Raises:
        ValueError: an entropy or KL coefficient without its tensor.
    """
    weighted_R = advantages_R if importance_weights_R is None else advantages_R * importance_weights_R
    active_R = (advantages_R != 0) & advantages_R.isfinite() & (weighted_R != 0)
    # Select on the inputs: masking the product afterwards would leave 0 * inf = NaN in the backward pass.
    advantage_R = torch.where(active_R, weighted_R.detach(), 0.0)
    log_ratio_R = torch.where(active_R, log_probs_R, 0.0) - torch.where(active_R, old_log_probs_R, 0.0)

    floor, ceiling = _preclip_bounds(config)
    preclipped_R = log_ratio_R.clamp(floor, ceiling)
    lower_R, upper_R = _clip_bounds(advantage_R, config)
    loss_R = -preclipped_R.clamp(lower_R, upper_R).exp() * advantage_R
    if config.entropy_coefficient != 0.0:
        if entropy_R is None:
            raise ValueError(
                f"algorithm.entropy_coefficient is {config.entropy_coefficient}: pass entropy_R, or set it to 0"
            )
        loss_R = loss_R - config.entropy_coefficient * entropy_R
    if config.kl_loss_coefficient != 0.0:
        if reference_log_probs_R is None:
            raise ValueError(
                f"algorithm.kl_loss_coefficient is {config.kl_loss_coefficient}: pass reference_log_probs_R, "
                "or set it to 0"
            )
        kl_R = kl_estimate(
            log_probs_R, reference_log_probs_R, config.kl_loss_estimator, bound=config.kl_loss_bound or math.inf
        )
        loss_R = loss_R + config.kl_loss_coefficient * kl_R
    return PolicyLossResult(
        per_token_loss=loss_R,
        ratio=preclipped_R.detach().exp(),
        preclipped_low=log_ratio_R < floor,
        preclipped_high=log_ratio_R > ceiling,
        clipped_low=preclipped_R < lower_R,
        clipped_high=preclipped_R > upper_R,
    )


def kl_estimate(
    log_probs_R: Tensor, reference_log_probs_R: Tensor, estimator: KlEstimator, *, bound: float = math.inf
) -> Tensor:
    """Per-token estimates of KL(policy || reference) from tokens of the policy, [R], nats (Schulman, "Approximating KL
    Divergence", 2020). With g = log_prob - reference:

        k1 = g                  unbiased, but its own gradient has expectation zero
        k2 = g^2 / 2            its gradient is that of the divergence
        k3 = exp(-g) - 1 + g    unbiased and never negative; at most `bound`, without gradient there

    Unbounded, one token that the policy has left by 20 nats would weigh 4.9e8.
    """
    gap_R = log_probs_R - reference_log_probs_R
    match estimator:
        case "k1":
            return gap_R
        case "k2":
            return 0.5 * gap_R.square()
        case "k3":
            # The gap is cut where k3 exceeds the bound for certain: exp of a far gap is infinite, and 0 * inf in the
            # backward pass is no number.
            cut_R = gap_R.clamp(-1.0 - math.log1p(bound), bound + 1.0)
            return ((-cut_R).expm1() + cut_R).clamp(max=bound)


def aggregation_weights(cu_response: Tensor, config: AlgorithmSection) -> Aggregation:
    """Token weights and denominator shares of `config.aggregation`; see `Aggregation` for their use.

    "sequence_mean" (paper): the mean over a response's tokens, then the mean over responses.
    "token_mean": the mean over all tokens of the batch.
    "constant_length": the sum over a response's tokens divided by `constant_length`, then the mean over responses.
    Filtered tokens are counted like all others.

    Args:
        cu_response: int64 [N + 1], offsets into the flat response axis.
    """
    lengths_N = response_lengths(cu_response)
    ones_N = torch.ones_like(lengths_N, dtype=torch.float32)
    match config.aggregation:
        case "sequence_mean":
            weights_N, counts_N = 1.0 / lengths_N, ones_N
        case "token_mean":
            weights_N, counts_N = ones_N, lengths_N.float()
        case "constant_length":
            weights_N, counts_N = ones_N / config.constant_length, ones_N
    return Aggregation(weights=weights_N.repeat_interleave(lengths_N), counts=counts_N)


def _preclip_bounds(config: AlgorithmSection) -> tuple[float, float]:
    """Bounds of the log-ratio for every token: ln delta_min, ln delta_max in the paper."""
    if not config.preclip:
        return -math.inf, math.inf
    return math.log(config.preclip_min), math.log(config.preclip_max)


def _clip_bounds(advantage_R: Tensor, config: AlgorithmSection) -> tuple[Tensor, Tensor]:
    """Bounds of the log-ratio by the sign of the advantage, [R] each; the table stands in `policy_loss`."""
    negative_R = advantage_R < 0
    dual = math.inf if config.dual_clip is None else math.log(config.dual_clip)
    lower_R = torch.full_like(advantage_R, -math.inf).masked_fill(negative_R, math.log1p(-config.clip_low))
    upper_R = torch.full_like(advantage_R, math.log1p(config.clip_high)).masked_fill(negative_R, dual)
    return lower_R, upper_R


def mismatch_metrics(trainer_log_probs_R: Tensor, sampler_log_probs_R: Tensor, *, threshold: float) -> dict[str, float]:
    """How far the two engines disagree on the log-probs (nats) of the same sampled tokens, float [R] each.

    Keys: `mean_abs` and `max_abs` of the difference; `kl`, the k3 estimate of KL(sampler || trainer) per token,
    mean(r - 1 - ln r) with r = p_trainer / p_sampler, which is non-negative and has low variance; `share_beyond`, the
    share of tokens whose difference is above `threshold` or no number. Non-finite log-probs propagate into the others.

    Raises:
        ValueError: no tokens.
    """
    if trainer_log_probs_R.numel() == 0:
        raise ValueError("mismatch_metrics got 0 tokens: call it on a batch with at least one response token")
    gap_R = trainer_log_probs_R.detach().double() - sampler_log_probs_R.detach().double()
    return {
        "mean_abs": float(gap_R.abs().mean()),
        "max_abs": float(gap_R.abs().max()),
        "kl": float((gap_R.expm1() - gap_R).mean()),
        "share_beyond": float((~(gap_R.abs() <= threshold)).double().mean()),
    }


def truncated_importance_weights(trainer_log_probs_R: Tensor, sampler_log_probs_R: Tensor, cap: float) -> Tensor:
    """Weights min(p_trainer / p_sampler, cap) that correct for sampling from the other engine; float [R], no gradient.

    `trainer_log_probs_R` are the trainer's *old* log-probs. Truncation bounds the variance at the price of a bias.
    """
    gap_R = trainer_log_probs_R.detach() - sampler_log_probs_R.detach()
    return gap_R.exp().clamp(max=cap)
