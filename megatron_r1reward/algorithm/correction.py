"""The gap between the engine that samples and the engine that trains: measure it, and correct for it."""

from __future__ import annotations

from torch import Tensor


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
