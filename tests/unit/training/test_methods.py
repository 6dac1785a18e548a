"""Every method of `algorithm.method` against its published formula, written out here in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rollouts import prompt, rollout, scored

from megatron_r1reward.algorithm.advantages import normalize_and_filter
from megatron_r1reward.algorithm.policy_loss import aggregation_weights, policy_loss
from megatron_r1reward.algorithm.returns import generalized_advantages, overlong_penalties, task_returns
from megatron_r1reward.config.load import dump_config, load_config
from megatron_r1reward.config.methods import METHODS, Method, describe
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.reward.terms import own_terms, reward_of
from megatron_r1reward.training.critic import value_loss
from megatron_r1reward.training.rollout_batch import compared_rewards

REPOSITORY = Path(__file__).parents[3]
# (F, A, C) of each response; two prompts, four samples each. Late in training one is wrong, which the filters reject,
# and a token is beyond Pre-CLIP.
PARTS = {
    "early": [(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1)],
    "late": [(0, 0, 0), (1, 1, 1), (1, 1, 0), *[(1, 1, 1)] * 5],
}
LENGTHS = [3, 17, 5, 9, 20, 4, 19, 6]
MAX_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a formula is written in: lists over responses, of tensors over their tokens. Float64."""

    new: list[torch.Tensor]
    old: list[torch.Tensor]
    reference: list[torch.Tensor]
    values: list[torch.Tensor]  # a critic's
    rewards: list[float]
    terms: list[tuple[float, ...]]  # weighted

    @property
    def groups(self) -> list[list[int]]:
        return [[0, 1, 2, 3], [4, 5, 6, 7]]


def config_of(method: str, **algorithm: Any) -> RunConfig:
    here: dict[str, Any] = {"run": {"output_dir": "o"}, "model": {"path": "p"}, "data": {"train": "t"}}
    here |= {"algorithm": {"method": method, **algorithm}, "sampling": {"max_tokens": MAX_TOKENS}}
    return RunConfig.model_validate(here)


def parts_of(config: RunConfig, time: str) -> list[tuple[float, float, float]]:
    """Without a judge nobody is asked, and C is 0."""
    return [(f, a, c * config.reward.use_judge) for f, a, c in PARTS[time]]


def items_of(config: RunConfig, time: str) -> list[Any]:
    found = []
    for number, ((f, a, c), length) in enumerate(zip(parts_of(config, time), LENGTHS, strict=True)):
        item = scored(rollout(prompt(f"p{number // 4}"), [0] * length, sample=number % 4))
        reward = reward_of(own_terms(f, a, c), config.reward)
        found.append(replace(item, format_reward=f, result_reward=a, consistency_reward=c, reward=reward))
    return found


def make_case(config: RunConfig, time: str) -> Case:
    torch.manual_seed(0)
    old = [-torch.rand(length, dtype=torch.float64) - 0.1 for length in LENGTHS]
    # Ratios on both sides of every clip; whole responses that move a little, for GSPO's narrow one.
    drift = [scale * (torch.randn(len(o), dtype=torch.float64)) for scale, o in zip([0.3, 1e-3] * 4, old, strict=True)]
    if time == "late":
        drift[1][0] = -8.0
    section = config.reward
    parts = parts_of(config, time)
    terms = [(section.format_weight * f, float(a), section.consistency_weight * a * c) for f, a, c in parts]
    return Case(
        new=[(o + d).requires_grad_() for o, d in zip(old, drift, strict=True)],
        old=old,
        reference=[o + 0.2 * torch.randn(len(o), dtype=torch.float64) for o in old],
        values=[torch.rand(length).double() for length in LENGTHS],
        rewards=[sum(term) for term in terms],
        terms=terms,
    )


def ours(config: RunConfig, case: Case, time: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token losses, flat, and the batch loss, by the trainer's own functions."""
    algorithm = config.algorithm
    cu_response = torch.tensor([0, *LENGTHS]).cumsum(0)
    new_R, old_R, reference_R = (torch.cat(parts) for parts in (case.new, case.old, case.reference))
    rewards_N = compared_rewards(config, items_of(config, time))
    earned: dict[str, Any] = {
        "kl_tokens_R": old_R - reference_R, "kl_coefficient": algorithm.kl_coefficient, "gamma": algorithm.gamma
    }  # fmt: skip
    if algorithm.needs_critic:
        values_R, gae_lambda = torch.cat(case.values), algorithm.gae_lambda
        returns_R, _ = generalized_advantages(rewards_N, cu_response, values_R, gae_lambda=gae_lambda, **earned)
    else:
        returns_R = task_returns(rewards_N, cu_response, **earned)
    advantages_R = normalize_and_filter(returns_R, algorithm).advantages.double()
    result = policy_loss(
        new_R, old_R, advantages_R, algorithm, cu_response=cu_response, reference_log_probs_R=reference_R
    )
    aggregation = aggregation_weights(cu_response, algorithm)
    total = (aggregation.weights.double() * result.per_token_loss).sum() / aggregation.counts.sum()
    return result.per_token_loss, total


# ---- the formulas


def clipped(ratio: torch.Tensor, advantage: Any, low: float = 0.2, high: float = 0.2) -> torch.Tensor:
    """-min(r A, clip(r, 1 - low, 1 + high) A)"""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def ratios(case: Case) -> list[torch.Tensor]:
    return [(n - o).exp() for n, o in zip(case.new, case.old, strict=True)]


def sample_std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


def group_advantages(case: Case, rewards: Sequence[float], *, divide: bool = True) -> list[float]:
    """(R - mean) / std within the group: DeepSeekMath (arXiv 2402.03300) sec. 4.1.2."""
    found = [0.0] * len(rewards)
    for group in case.groups:
        inside = [rewards[i] for i in group]
        mean, std = sum(inside) / len(inside), sample_std(inside) if divide else 1.0
        for i in group:
            found[i] = (rewards[i] - mean) / std if rewards[i] != mean else 0.0
    return found


def whitened(per_token: list[torch.Tensor]) -> list[torch.Tensor]:
    """Over all tokens of the batch, population deviation."""
    flat = torch.cat(per_token)
    return [(part - flat.mean()) / flat.std(correction=0) for part in per_token]


def token_rewards(case: Case, beta: float) -> list[torch.Tensor]:
    """Reinforce++ (arXiv 2501.03262 v9 eqs. 8 and 9): r(x, y) - beta * sum_{i >= t} ln pi_old / pi_ref."""
    found = []
    for reward, old, reference in zip(case.rewards, case.old, case.reference, strict=True):
        tail = (old - reference).flip(0).cumsum(0).flip(0)
        found.append(reward - beta * tail)
    return found


def constant(case: Case, values: Sequence[float]) -> list[torch.Tensor]:
    return [torch.full_like(o, value) for o, value in zip(case.old, values, strict=True)]


def ppo(case: Case, advantages: list[torch.Tensor], **bounds: float) -> list[torch.Tensor]:
    return [clipped(r, a, **bounds) for r, a in zip(ratios(case), advantages, strict=True)]


def with_preclip(case: Case, advantages: list[torch.Tensor]) -> list[torch.Tensor]:
    """StableReinforce, Alg. 1 of arXiv 2505.02835."""
    bounded = [(n - o).clamp(math.log(1e-3), math.log(1e3)).exp() for n, o in zip(case.new, case.old, strict=True)]
    return [clipped(r, a) for r, a in zip(bounded, advantages, strict=True)]


def paper_filter(advantages: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.where(a.abs() <= 3.0, a, 0.0) for a in advantages]


def released_filter(case: Case, raw: list[torch.Tensor]) -> list[torch.Tensor]:
    """Bounds around the mean of the raw returns."""
    mean = torch.cat(raw).mean()
    return [torch.where((a >= mean - 3) & (a <= mean + 3) & (a.abs() <= 10), a, 0.0) for a in whitened(raw)]


def stable(case: Case) -> list[torch.Tensor]:
    return with_preclip(case, paper_filter(whitened(constant(case, case.rewards))))


def released(case: Case) -> list[torch.Tensor]:
    return with_preclip(case, released_filter(case, token_rewards(case, 1e-3)))


def grpo(case: Case) -> list[torch.Tensor]:
    """DeepSeekMath eqs. 3 and 4: the KL estimate pi_ref / pi - ln(pi_ref / pi) - 1, beta = 0.04, in the loss."""
    losses = ppo(case, constant(case, group_advantages(case, case.rewards)))
    gaps = [reference - new for reference, new in zip(case.reference, case.new, strict=True)]
    return [loss + 0.04 * (gap.exp() - gap - 1) for loss, gap in zip(losses, gaps, strict=True)]


def rloo(case: Case) -> list[torch.Tensor]:
    """arXiv 2402.14740: each reward minus the mean of the others; clipped like the others here."""
    advantages = [0.0] * len(case.rewards)
    for group in case.groups:
        for i in group:
            advantages[i] = case.rewards[i] - sum(case.rewards[j] for j in group if j != i) / (len(group) - 1)
    return ppo(case, constant(case, advantages))


def dr_grpo(case: Case) -> list[torch.Tensor]:
    return ppo(case, constant(case, group_advantages(case, case.rewards, divide=False)))


def dapo(case: Case) -> list[torch.Tensor]:
    """arXiv 2503.14476: eq. 10 (clip-higher), eq. 13 (soft overlong punishment)."""
    cache = MAX_TOKENS // 5
    rewards = []
    for reward, length in zip(case.rewards, LENGTHS, strict=True):
        inside = 0.0 if length <= MAX_TOKENS - cache else ((MAX_TOKENS - cache) - length) / cache
        rewards.append(reward + inside)
    return ppo(case, constant(case, group_advantages(case, rewards)), low=0.2, high=0.28)


def gspo(case: Case) -> list[torch.Tensor]:
    """arXiv 2507.18071 eqs. 5 and 7: one ratio per response, its gradient through all of its tokens."""
    losses = []
    for new, old, advantage in zip(case.new, case.old, group_advantages(case, case.rewards), strict=True):
        s = ((new.sum() - old.sum()) / len(old)).exp()
        losses.append(clipped(s, advantage, 3e-4, 4e-4).expand(len(old)))
    return losses


def cispo(case: Case) -> list[torch.Tensor]:
    """arXiv 2506.13585 eqs. 4 and 5, without a lower bound; the upper one 5."""
    advantages = group_advantages(case, case.rewards)
    weights = [r.detach().clamp(max=5.0) for r in ratios(case)]
    return [-w * a * n for w, a, n in zip(weights, advantages, case.new, strict=True)]


def sapo(case: Case) -> list[torch.Tensor]:
    """arXiv 2511.20347 sec. 3: sigmoid(tau (r - 1)) 4 / tau, tau 1 for positive advantages, 1.05 for negative."""
    losses = []
    for ratio, advantage in zip(ratios(case), group_advantages(case, case.rewards), strict=True):
        tau = 1.0 if advantage > 0 else 1.05
        losses.append(-(1 / (1 + (-tau * (ratio - 1)).exp())) * 4 / tau * advantage)
    return losses


def gdpo(case: Case) -> list[torch.Tensor]:
    """arXiv 2601.05242 sec. 3.1: A_k per term, their weighted sum, normalised over the batch."""
    weights, total = (0.5, 1.0, 0.5), [0.0] * len(case.rewards)
    for k, weight in enumerate(weights):
        raw = [terms[k] / weight for terms in case.terms]
        total = [t + weight * a for t, a in zip(total, group_advantages(case, raw), strict=True)]
    return ppo(case, whitened(constant(case, total)))


def gae(case: Case, lam: float) -> list[torch.Tensor]:
    """arXiv 1506.02438 eq. 16: sum_l (gamma lambda)^l delta_{t+l}, gamma = 1; nothing follows the last token."""
    found = []
    for reward, values in zip(case.rewards, case.values, strict=True):
        rewards = [0.0] * (len(values) - 1) + [reward]
        deltas = [r + after - now for r, after, now in zip(rewards, [*values[1:], 0.0], values, strict=True)]
        tails = [deltas[t:] for t in range(len(deltas))]
        found.append(torch.stack([torch.stack([lam**n * d for n, d in enumerate(tail)]).sum() for tail in tails]))
    return found


Formula = Callable[[Case], list[torch.Tensor]]
FORMULAS: dict[str, tuple[Formula, str]] = {
    "stable_reinforce": (stable, "sequences"),
    "stable_reinforce_without_preclip": (
        lambda case: ppo(case, paper_filter(whitened(constant(case, case.rewards)))), "sequences"
    ),
    "stable_reinforce_without_filter": (
        lambda case: with_preclip(case, whitened(constant(case, case.rewards))), "sequences"
    ),
    "stable_reinforce_without_consistency": (stable, "sequences"),  # C is 0 where nobody is asked
    "released_code": (released, "sequences"),
    "released_code_constant_length": (released, "constant"),
    "reinforce_plus_plus": (lambda case: ppo(case, whitened(token_rewards(case, 1e-3))), "sequences"),
    "rloo": (rloo, "constant"),
    "grpo": (grpo, "sequences"),
    "dr_grpo": (dr_grpo, "constant"),
    "dapo": (dapo, "tokens"),
    "gspo": (gspo, "sequences"),
    "cispo": (cispo, "tokens"),
    "sapo": (sapo, "sequences"),
    "gdpo": (gdpo, "sequences"),
    "ppo": (lambda case: ppo(case, whitened(gae(case, 1.0))), "tokens"),
}  # fmt: skip


def batch_loss(losses: list[torch.Tensor], over: str) -> torch.Tensor:
    match over:
        case "sequences":
            return torch.stack([loss.mean() for loss in losses]).mean()
        case "tokens":
            return torch.cat(losses).mean()
        case _:
            return torch.stack([loss.sum() / 1024 for loss in losses]).mean()


@pytest.mark.parametrize("time", PARTS)
@pytest.mark.parametrize("method", get_args(Method))
def test_a_method_is_its_published_formula(method: str, time: str) -> None:
    config = config_of(method)
    case = make_case(config, time)
    formula, over = FORMULAS[method]
    expected = formula(case)
    per_token_R, total = ours(config, case, time)
    # Rewards and advantages are stored as float32.
    torch.testing.assert_close(per_token_R, torch.cat(expected), rtol=1e-5, atol=1e-6)
    theirs = batch_loss(expected, over)
    torch.testing.assert_close(total, theirs, rtol=1e-5, atol=1e-7)
    mine = torch.autograd.grad(total, case.new)
    gradients = torch.autograd.grad(theirs, case.new)
    for found, gradient in zip(mine, gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


def test_the_cases_tell_methods_apart() -> None:
    """A formula that another method fulfils as well would prove nothing."""
    found = set()
    for method in get_args(Method):
        config = config_of(method)
        found.add(round(float(ours(config, make_case(config, "late"), "late")[1]), 9))
    assert len(found) == len(get_args(Method))


@pytest.mark.parametrize("time", PARTS)
def test_ppo_with_another_lambda_and_a_kl_in_the_reward(time: str) -> None:
    """The penalty of a token is earned at that token: KL in the reward as in arXiv 1909.08593 eq. 2."""
    config = config_of("ppo", gae_lambda=0.95, kl_coefficient=0.1)
    case = make_case(config, time)
    advantages = []
    for plain, old, reference in zip(gae(case, 0.95), case.old, case.reference, strict=True):
        penalties = -0.1 * (old - reference)
        tails = [penalties[t:] for t in range(len(penalties))]
        tails_sum = [sum(0.95**n * p for n, p in enumerate(tail)) for tail in tails]
        advantages.append(plain + torch.tensor(tails_sum, dtype=torch.float64))
    expected = torch.cat(ppo(case, whitened(advantages)))
    torch.testing.assert_close(ours(config, case, time)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [0.2, 0.0])
@pytest.mark.parametrize(("aggregation", "over"), [("token_mean", "tokens"), ("sequence_mean", "sequences")])
def test_the_value_loss_is_the_clipped_one_of_the_implementations(clip: float, aggregation: str, over: str) -> None:
    """0.5 max((V - G)^2, (clip(V, V_old +- eps) - G)^2), token by token, and its gradient."""
    config = config_of("ppo", aggregation=aggregation)
    case = make_case(config, "early")
    torch.manual_seed(1)
    new = [(v + 0.3 * torch.randn(len(v), dtype=torch.float64)).requires_grad_() for v in case.values]
    targets = [v + torch.randn(len(v), dtype=torch.float64) for v in case.values]
    expected, stopped = [], []
    for now, before, target in zip(new, case.values, targets, strict=True):
        tokens = []
        for v, v_old, g in zip(now, before, target, strict=True):
            moved = v_old + torch.clamp(v - v_old, -clip, clip) if clip else v
            free, held = (v - g) ** 2, (moved - g) ** 2
            tokens.append(0.5 * (free if free >= held else held))
            stopped.append(bool(held > free))
        expected.append(torch.stack(tokens))
    per_token_R, clipped_R = value_loss(*(torch.cat(parts) for parts in (new, case.values, targets)), clip=clip)
    torch.testing.assert_close(per_token_R, torch.cat(expected))
    assert clipped_R.tolist() == stopped
    assert any(stopped) == bool(clip)
    weights = aggregation_weights(torch.tensor([0, *LENGTHS]).cumsum(0), config.algorithm)
    total = (weights.weights.double() * per_token_R).sum() / weights.counts.sum()
    theirs = batch_loss(expected, over)
    torch.testing.assert_close(total, theirs, rtol=1e-6, atol=1e-8)
    mine, gradients = torch.autograd.grad(total, new), torch.autograd.grad(theirs, new)
    torch.testing.assert_close(torch.cat(mine), torch.cat(gradients), rtol=1e-5, atol=1e-9)
    assert (torch.cat(mine)[torch.tensor(stopped)] == 0).all(), "what the clip decides has no gradient"


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        (
            {"critic": {"lr": 1e-5}},
            r"critic.lr 1e-05 means nothing without a critic: remove it, or set algorithm.method",
        ),
        ({"algorithm": {"gae_lambda": 0.9}}, "gae_lambda 0.9 means nothing to advantage_estimator 'returns'"),
        ({"algorithm": {"method": "ppo", "samples_per_prompt": 4, "baseline": "group_mean"}}, "baseline 'group_mean'"),
        ({"algorithm": {"method": "ppo"}, "critic": {"warmup_steps": 100}}, "none of the 100 steps"),
    ],
)
def test_what_a_critic_does_not_go_with(sections: dict[str, Any], reason: str) -> None:
    here: dict[str, Any] = {"run": {"output_dir": "o"}, "model": {"path": "p"}, "data": {"train": "t"}}
    with pytest.raises(ValueError, match=reason):
        RunConfig.model_validate(here | sections)


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[3], [7, 0], [5, 1, 2], [6, 4]]])
@pytest.mark.parametrize("method", ["gspo", "cispo", "sapo"])
def test_micro_batches_do_not_change_loss_and_gradient(method: str, parts: list[list[int]]) -> None:
    """Sums over micro-batches, divided once by the count of the whole batch."""
    algorithm = config_of(method).algorithm
    case = make_case(config_of(method), "early")
    advantages = constant(case, [1.0, -1.0, 0.0, 0.5, -0.5, 2.0, -2.0, math.nan])

    def loss(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        cu_response = torch.tensor([0, *(LENGTHS[i] for i in indices)]).cumsum(0)
        new_R, old_R, advantages_R = (
            torch.cat([values[i] for i in indices]) for values in (case.new, case.old, advantages)
        )
        result = policy_loss(new_R, old_R, advantages_R, algorithm, cu_response=cu_response)
        aggregation = aggregation_weights(cu_response, algorithm)
        return (aggregation.weights * result.per_token_loss).sum(), aggregation.counts.sum()

    total, count = loss(range(8))
    pieces = [loss(indices) for indices in parts]
    again, again_count = (sum(column) for column in zip(*pieces, strict=True))
    torch.testing.assert_close(again / again_count, total / count)
    whole, split = torch.autograd.grad(total, case.new), torch.autograd.grad(again, case.new)
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other)
    assert float(whole[2].abs().max()) == float(whole[7].abs().max()) == 0.0


@pytest.mark.parametrize("method", ["gspo", "cispo", "sapo"])
def test_broken_tokens_without_signal_stay_out_and_far_ratios_stay_numbers(method: str) -> None:
    algorithm = config_of(method).algorithm
    new = torch.tensor([math.nan, -math.inf, -1.0, -1.0, -0.1, -400.0], requires_grad=True)
    old = torch.tensor([-1.0, math.nan, -1.0, -1.0, -400.0, -0.1])
    advantages = torch.tensor([0.0, math.nan, 1.0, -1.0, 1.0, -1.0])
    result = policy_loss(new, old, advantages, algorithm, cu_response=torch.tensor([0, 2, 4, 5, 6]))
    result.per_token_loss.sum().backward()
    assert new.grad is not None
    assert new.grad.isfinite().all()
    assert result.per_token_loss.isfinite().all()
    assert result.per_token_loss[:2].tolist() == new.grad[:2].tolist() == [0.0, 0.0]


def test_gspo_without_offsets_is_refused() -> None:
    with pytest.raises(ValueError, match="'gspo': pass cu_response"):
        policy_loss(torch.zeros(2), torch.zeros(2), torch.ones(2), config_of("gspo").algorithm)


def test_overlong_responses_pay_by_their_length() -> None:
    lengths = torch.tensor([10, 16, 17, 18, 20, 25])
    assert overlong_penalties(lengths, 20, 0.2).tolist() == pytest.approx([0.0, 0.0, -0.25, -0.5, -1.0, -1.0])
    assert overlong_penalties(lengths, 20, 0.0).tolist() == [0.0] * 6


@pytest.mark.parametrize("method", get_args(Method))
def test_one_override_of_the_demos_run_file_is_enough(method: str, tmp_path: Path) -> None:
    config = load_config(REPOSITORY / "recipes" / "demo" / "rl.toml", [f"algorithm.method={method}"])
    for key, value in METHODS[method].items():
        section, _, name = key.partition(".")
        assert getattr(getattr(config, section), name) == value
    dump_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config, "what a run writes down is what it was"
    assert describe(config).startswith(f"algorithm.method {method!r}: ")
    assert "set otherwise" not in describe(config)


def test_what_the_run_file_says_wins_and_is_told() -> None:
    config = config_of("dapo", clip_high=0.4, samples_per_prompt=16)
    assert (config.algorithm.clip_high, config.algorithm.samples_per_prompt) == (0.4, 16)
    assert config.rl.dynamic_sampling_rounds == 3
    assert (
        "set otherwise by the run file: algorithm.clip_high = 0.4 (the method's: 0.28), "
        "algorithm.samples_per_prompt = 16 (the method's: 4)" in describe(config)
    )
    everything = RunConfig.model_validate(
        config_of("stable_reinforce").model_dump() | {"algorithm": {"method": "grpo", "filter": "paper"}}
    )
    assert "algorithm.filter = 'paper' (the method's: 'none')" in describe(everything)


@pytest.mark.parametrize("method", ["ppo_with_luck", ["grpo"], 3])
def test_an_unknown_method_is_refused_with_the_known_ones(method: Any) -> None:
    with pytest.raises(ValueError, match="'dapo'"):
        config_of(method)
