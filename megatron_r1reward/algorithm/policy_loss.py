"""The policy-gradient losses with Pre-CLIP, per token, how tokens add up to one number, and the gap between the
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

# Where SAPO's gate is flat in every float type, and the ratio still a number.
SATURATED_LOG_RATIO = 80.0


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
    # Of the losses that clip. CISPO clips for either sign of A, and a clipped token keeps its gradient.
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
    cu_response: Tensor | None = None,
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

    That is `config.loss = "ppo"`. The others, with the same rho but for "gspo":

        gspo   rho is that of the whole response, `sequence_log_ratio` (GSPO-token, arXiv 2507.18071 eqs. 13 and 14;
               where the tokens of a response share their advantage it is GSPO, eqs. 5 and 7)
        cispo  -sg(clip(rho, 1 - eps_lo, 1 + eps_hi)) A log_prob (arXiv 2506.13585 eqs. 4 and 5)
        sapo   -4 / tau sigmoid(tau (rho - 1)) A with a tau for each sign of A (arXiv 2511.20347 sec. 3)

    The entropy bonus, -entropy_coefficient * entropy, and the KL term, kl_loss_coefficient * `kl_estimate`, apply to
    every token, also to those without an advantage.

    Args:
        log_probs_R: float [R], natural log, with gradient.
        old_log_probs_R: float [R], of the policy that the update started from.
        advantages_R: float [R].
        cu_response: int64 [N + 1], offsets of whole responses into the flat axis; needed by "gspo".
        importance_weights_R: float [R] >= 0, `truncated_importance_weights`; multiplies the loss.
        entropy_R: float [R], nats, with gradient; needed when `config.entropy_coefficient` is not 0.
        reference_log_probs_R: float [R]; needed when `config.kl_loss_coefficient` is not 0.

    Raises:
        ValueError: an entropy or KL coefficient without its tensor, "gspo" without the offsets.
    """
    weighted_R = advantages_R if importance_weights_R is None else advantages_R * importance_weights_R
    active_R = (advantages_R != 0) & advantages_R.isfinite() & (weighted_R != 0)
    # Select on the inputs: masking the product afterwards would leave 0 * inf = NaN in the backward pass.
    advantage_R = torch.where(active_R, weighted_R.detach(), 0.0)
    active_log_probs_R = torch.where(active_R, log_probs_R, 0.0)
    if config.loss == "gspo":
        if cu_response is None:
            raise ValueError("algorithm.loss is 'gspo': pass cu_response, its ratio is that of whole responses")
        log_ratio_R = sequence_log_ratio(log_probs_R, old_log_probs_R, active_R, cu_response)
    else:
        log_ratio_R = active_log_probs_R - torch.where(active_R, old_log_probs_R, 0.0)

    floor, ceiling = _preclip_bounds(config)
    preclipped_R = log_ratio_R.clamp(floor, ceiling)
    lower_R, upper_R = _clip_bounds(advantage_R, config)
    clipped_R = preclipped_R.clamp(lower_R, upper_R)
    match config.loss:
        case "ppo" | "gspo":
            loss_R = -clipped_R.exp() * advantage_R
        case "cispo":
            loss_R = -clipped_R.detach().exp() * advantage_R * active_log_probs_R
        case "sapo":
            loss_R = -_soft_gate(clipped_R, advantage_R, config) * advantage_R
    return PolicyLossResult(
        per_token_loss=_with_regularizers(loss_R, log_probs_R, entropy_R, reference_log_probs_R, config),
        ratio=preclipped_R.detach().exp(),
        preclipped_low=log_ratio_R < floor,
        preclipped_high=log_ratio_R > ceiling,
        clipped_low=active_R & (preclipped_R < lower_R),
        clipped_high=active_R & (preclipped_R > upper_R),
    )


def _with_regularizers(
    loss_R: Tensor,
    log_probs_R: Tensor,
    entropy_R: Tensor | None,
    reference_log_probs_R: Tensor | None,
    config: AlgorithmSection,
) -> Tensor:
    """The loss with entropy bonus and KL term, where their coefficients are not 0."""
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
    return loss_R


def sequence_log_ratio(log_probs_R: Tensor, old_log_probs_R: Tensor, active_R: Tensor, cu_response: Tensor) -> Tensor:
    """The mean log-ratio over the tokens of each response, at every active token of it, [R]; 0 elsewhere. A token's
    gradient is that of its own log-prob: ln s_{i,t} of GSPO-token. Responses without an active token are not read."""
    lengths = response_lengths(cu_response).tolist()  # on the host: the device is never waited for
    parts = zip(
        *(values_R.detach().split(lengths) for values_R in (log_probs_R, old_log_probs_R, active_R)), strict=True
    )
    means = [torch.where(active.any(), new - old, 0.0).mean().expand(len(new)) for new, old, active in parts]
    mean_R = torch.cat(means) if means else log_probs_R.detach()
    own_R = torch.where(active_R, log_probs_R, 0.0)
    return torch.where(active_R, mean_R, 0.0) + own_R - own_R.detach()


def _soft_gate(log_ratio_R: Tensor, advantage_R: Tensor, config: AlgorithmSection) -> Tensor:
    """SAPO's gate in place of rho, [R]: its slope at rho = 1 is 1, and falls on both sides."""
    positive, negative = config.sapo_positive_temperature, config.sapo_negative_temperature
    tau_R = torch.full_like(advantage_R, negative).masked_fill(advantage_R > 0, positive)
    return 4.0 / tau_R * (tau_R * (log_ratio_R.clamp(max=SATURATED_LOG_RATIO).exp() - 1.0)).sigmoid()


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
    """Bounds of the log-ratio, [R] each; for "ppo" and "gspo" by the sign of the advantage, the table stands in
    `policy_loss`."""
    low = math.log1p(-config.clip_low) if config.clip_low < 1.0 else -math.inf
    high = math.log1p(config.clip_high)
    match config.loss:
        case "sapo":
            low, high = -math.inf, math.inf
        case "ppo" | "gspo":
            negative_R = advantage_R < 0
            dual = math.inf if config.dual_clip is None else math.log(config.dual_clip)
            lower_R = torch.full_like(advantage_R, -math.inf).masked_fill(negative_R, low)
            return lower_R, torch.full_like(advantage_R, high).masked_fill(negative_R, dual)
    return torch.full_like(advantage_R, low), torch.full_like(advantage_R, high)


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
