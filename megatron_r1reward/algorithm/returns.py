"""From one reward per response to one return per response token.

Suffixes name axes: `_N` are sequences, `_R` is the flat response axis: the response tokens of N sequences back to back,
cut by `cu_response`. Sequence i owns tokens [cu_response[i], cu_response[i + 1]).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Baseline = Literal["none", "group_mean", "leave_one_out"]

GROUP_STD_FLOOR = 1e-6


def group_rewards(rewards_N: Tensor, group_N: Tensor, *, baseline: Baseline, normalize: bool = False) -> Tensor:
    """Compare each response with the other samples of its prompt.

    Args:
        rewards_N: float [N], one reward per response.
        group_N: int64 [N], equal for the samples of one prompt. Any integers; all samples of a prompt must be present.
        baseline: what is subtracted: nothing, the group's mean (GRPO), or the mean of the *other* samples (RLOO).
        normalize: divide by the group's sample standard deviation (GRPO), floored at `GROUP_STD_FLOOR`.

    Returns:
        Rewards in the dtype of `rewards_N`, float [N]. A group of one has nothing to compare with: 0 under a baseline.

    Raises:
        ValueError: `normalize` without a baseline.
    """
    if baseline == "none":
        if normalize:
            raise ValueError(
                "algorithm.group_normalize needs a group baseline, and algorithm.baseline is 'none': set 'group_mean'"
            )
        return rewards_N
    _, member_N = torch.unique(group_N, return_inverse=True)
    size_N = _group_sum(torch.ones_like(rewards_N, dtype=torch.float64), member_N)
    others_N = (size_N - 1).clamp(min=1)
    rewards_f64 = rewards_N.double()
    centred_N = rewards_f64 - _group_sum(rewards_f64, member_N) / size_N
    # r - mean(others) = (r - mean(all)) * n / (n - 1)
    compared_N = centred_N * size_N / others_N if baseline == "leave_one_out" else centred_N
    if normalize:
        std_N = (_group_sum(centred_N.square(), member_N) / others_N).sqrt()
        compared_N = compared_N / std_N.clamp(min=GROUP_STD_FLOOR)
    return compared_N.to(rewards_N.dtype)


def decoupled_rewards(terms_KN: Tensor, weights: Sequence[float], group_N: Tensor, *, baseline: Baseline) -> Tensor:
    """Each term of the reward normalised on its own, then added by weight (GDPO, arXiv 2601.05242 sec. 3.1), [N].

    A term is compared within its group, without a baseline with the group's mean, and divided by its standard deviation
    there. Where all have the same it adds nothing. GDPO normalises the sum over the batch afterwards
    (`algorithm.normalize = "global"`).
    """
    baseline = "group_mean" if baseline == "none" else baseline
    compared = [group_rewards(term_N, group_N, baseline=baseline, normalize=True) for term_N in terms_KN]
    return sum((w * term_N for w, term_N in zip(weights, compared, strict=True)), torch.zeros_like(terms_KN[0]))


def overlong_penalties(lengths_N: Tensor, max_tokens: int, buffer: float) -> Tensor:
    """Soft overlong punishment (DAPO, arXiv 2503.14476 eq. 13): 0 up to max_tokens - cache, then linearly down to -1 at
    max_tokens, cache = buffer * max_tokens; float32 [N]. buffer 0: none."""
    if buffer == 0.0:
        return torch.zeros(len(lengths_N))
    cache = buffer * max_tokens
    return ((max_tokens - cache - lengths_N) / cache).clamp(-1.0, 0.0).float()


def task_returns(
    rewards_N: Tensor,
    cu_response: Tensor,
    *,
    kl_tokens_R: Tensor | None = None,
    kl_coefficient: float = 0.0,
    gamma: float = 1.0,
) -> Tensor:
    """Return of every response token: G_t = r_t + gamma * G_{t+1}, r_t = -beta * k1_t + [t is the last token] * R.

    This is Reinforce++, as in the paper and the released code; `generalized_advantages` is with a critic. With beta = 0
    and gamma = 1 every token of a response carries exactly its reward.

    Args:
        rewards_N: float [N], R of each response (after `group_rewards` where a baseline is used).
        cu_response: int64 [N + 1], offsets into the flat response axis.
        kl_tokens_R: float [R], k1 = log pi_old - log pi_ref per token, in nats; needed when `kl_coefficient` > 0.
        kl_coefficient: beta.
        gamma: discount per token.

    Returns:
        float32 [R]; accumulated in float64.

    Raises:
        ValueError: beta > 0 without `kl_tokens_R`; malformed `cu_response`.
    """
    token_rewards_R = _token_rewards(rewards_N, cu_response, kl_tokens_R, kl_coefficient)
    return _discounted_suffix_sum(token_rewards_R, cu_response, gamma).float()


def generalized_advantages(
    rewards_N: Tensor,
    cu_response: Tensor,
    values_R: Tensor,
    *,
    gae_lambda: float,
    kl_tokens_R: Tensor | None = None,
    kl_coefficient: float = 0.0,
    gamma: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Advantage of every response token (GAE, arXiv 1506.02438 eq. 16) and what the critic learns there, float32 [R]
    each, accumulated in float64:

        delta_t = r_t + gamma V_{t+1} - V_t          V after the last token of a response is 0
        A_t     = sum_l (gamma lambda)^l delta_{t+l}
        G_t     = A_t + V_t

    r_t and the arguments are those of `task_returns`. With lambda = 1, G is the return that it gives.

    Args:
        values_R: float [R], V_t, what is expected from token t on, before it is known.
        gae_lambda: lambda.

    Raises:
        ValueError: as `task_returns`.
    """
    values_R = values_R.double()
    next_values_R = torch.cat([values_R[1:], values_R.new_zeros(1)])
    next_values_R[cu_response[1:] - 1] = 0.0
    token_rewards_R = _token_rewards(rewards_N, cu_response, kl_tokens_R, kl_coefficient)
    deltas_R = token_rewards_R + gamma * next_values_R - values_R
    advantages_R = _discounted_suffix_sum(deltas_R, cu_response, gamma * gae_lambda)
    return advantages_R.float(), (advantages_R + values_R).float()


def _token_rewards(rewards_N: Tensor, cu_response: Tensor, kl_tokens_R: Tensor | None, kl_coefficient: float) -> Tensor:
    """r_t = -beta k1_t + [t is the last token] R, float64 [R]; the errors of `task_returns`."""
    lengths_N = response_lengths(cu_response)
    assert rewards_N.shape == lengths_N.shape, f"{len(rewards_N)} rewards for {len(lengths_N)} responses"
    token_rewards_R = torch.zeros(int(cu_response[-1]), dtype=torch.float64, device=rewards_N.device)
    if kl_coefficient > 0.0:
        if kl_tokens_R is None:
            raise ValueError(f"algorithm.kl_coefficient is {kl_coefficient}: pass kl_tokens_R, or set it to 0")
        token_rewards_R -= kl_coefficient * kl_tokens_R.double()
    token_rewards_R[cu_response[1:] - 1] += rewards_N.double()
    return token_rewards_R


def response_lengths(cu_response: Tensor) -> Tensor:
    """Tokens of each response, int64 [N], from offsets int64 [N + 1].

    Raises ValueError when the offsets do not start at 0, or when a response is empty: it has no token that could carry
    its reward.
    """
    if cu_response.numel() == 0 or int(cu_response[0]) != 0:
        raise ValueError(f"cu_response must start with offset 0, got {cu_response.tolist()[:4]}: pass [0, len_0, ...]")
    lengths_N = cu_response.diff()
    if bool((lengths_N < 1).any()):
        first = int((lengths_N < 1).nonzero()[0])
        raise ValueError(f"response {first} has {int(lengths_N[first])} tokens: drop empty responses from the batch")
    return lengths_N


def _discounted_suffix_sum(values_R: Tensor, cu_response: Tensor, gamma: float) -> Tensor:
    """sum_{k >= t} gamma^(k - t) * values[k] within each sequence, in log2(longest) vectorised doubling steps.

    Sums never cross a boundary, so a non-finite value stays inside its own sequence.
    """
    lengths_N = cu_response.diff()
    sequence_R = torch.arange(len(lengths_N), device=lengths_N.device).repeat_interleave(lengths_N)
    longest = int(lengths_N.max()) if len(lengths_N) else 0
    total_R = values_R.clone()
    span = 1  # total[t] covers the tokens [t, t + span)
    while span < longest:
        same_sequence = sequence_R[span:] == sequence_R[:-span]
        total_R[:-span] += gamma**span * torch.where(same_sequence, total_R[span:], 0.0)
        span *= 2
    return total_R


def _group_sum(values_N: Tensor, member_N: Tensor) -> Tensor:
    """For each element the sum over its group, [N]."""
    return torch.zeros_like(values_N).index_add(0, member_N, values_N)[member_N]
