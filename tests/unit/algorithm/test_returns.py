"""Returns against their recursive definition, and group baselines against GRPO and RLOO by hand."""

import math

import pytest
import torch

from megatron_r1reward.algorithm.returns import Baseline, generalized_advantages, group_rewards, task_returns

REWARDS = torch.tensor([2.0, 0.5, 1.5])
OFFSETS = torch.tensor([0, 3, 4, 9])


def recursive_returns(kl: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """G_t = r_t + gamma * G_{t+1}, written as the loop it is."""
    returns = torch.zeros(len(kl), dtype=torch.float64)
    for i, reward in enumerate(REWARDS.tolist()):
        following = reward
        for t in reversed(range(int(OFFSETS[i]), int(OFFSETS[i + 1]))):
            last = t == int(OFFSETS[i + 1]) - 1
            following = -beta * float(kl[t]) + (reward if last else gamma * following)
            returns[t] = following
    return returns.float()


def test_without_kl_every_token_carries_exactly_the_reward() -> None:
    returns = task_returns(REWARDS, OFFSETS)
    assert returns.tolist() == [2.0, 2.0, 2.0, 0.5, 1.5, 1.5, 1.5, 1.5, 1.5]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5])
def test_equals_the_recursion(gamma: float, beta: float) -> None:
    kl = torch.randn(9, generator=torch.Generator().manual_seed(0))
    returns = task_returns(REWARDS, OFFSETS, kl_tokens_R=kl, kl_coefficient=beta, gamma=gamma)
    torch.testing.assert_close(returns, recursive_returns(kl, beta, gamma))


def test_long_responses() -> None:
    kl = torch.ones(1024)
    returns = task_returns(torch.tensor([1.0]), torch.tensor([0, 1024]), kl_tokens_R=kl, kl_coefficient=1e-3)
    torch.testing.assert_close(returns, 1.0 - 1e-3 * torch.arange(1024, 0, -1))


def test_a_broken_token_stays_inside_its_sequence() -> None:
    kl = torch.zeros(9)
    kl[5] = float("nan")
    returns = task_returns(REWARDS, OFFSETS, kl_tokens_R=kl, kl_coefficient=0.1)
    assert returns.isnan().tolist() == [False] * 4 + [True] * 2 + [False] * 3


def equation_16(values: torch.Tensor, kl: torch.Tensor, beta: float, gamma: float, lam: float) -> torch.Tensor:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t): arXiv 1506.02438, in its
    words."""
    found = []
    for i, reward in enumerate(REWARDS.double().tolist()):
        first, end = int(OFFSETS[i]), int(OFFSETS[i + 1])
        deltas = []
        for t in range(first, end):
            earned = -beta * float(kl[t]) + (reward if t == end - 1 else 0.0)
            following = float(values[t + 1]) if t + 1 < end else 0.0
            deltas.append(earned + gamma * following - float(values[t]))
        for t in range(len(deltas)):
            found.append(sum((gamma * lam) ** step * delta for step, delta in enumerate(deltas[t:])))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_generalized_advantages_are_equation_16(lam: float, gamma: float, beta: float) -> None:
    torch.manual_seed(0)
    values, kl = torch.randn(9), torch.randn(9)
    earned = {"kl_tokens_R": kl, "kl_coefficient": beta, "gamma": gamma}
    advantages, targets = generalized_advantages(REWARDS, OFFSETS, values, gae_lambda=lam, **earned)
    expected = equation_16(values, kl, beta, gamma, lam)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(targets.double(), expected + values.double(), rtol=1e-6, atol=1e-6)
    if lam == 1.0:
        torch.testing.assert_close(targets, task_returns(REWARDS, OFFSETS, **earned))


def test_a_masked_reward_and_a_broken_value_stay_inside_their_response() -> None:
    values = torch.zeros(9)
    values[6] = math.nan
    rewards = torch.tensor([math.nan, 0.5, 1.5])
    for found in generalized_advantages(rewards, OFFSETS, values, gae_lambda=0.95):
        assert found.isnan().tolist() == [True] * 3 + [False] + [True] * 3 + [False] * 2


def test_no_sequences() -> None:
    assert task_returns(torch.zeros(0), torch.tensor([0])).shape == (0,)


def test_kl_coefficient_without_kl_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"kl_coefficient is 0\.1"):
        task_returns(REWARDS, OFFSETS, kl_coefficient=0.1)


def test_an_empty_response_is_an_error() -> None:
    with pytest.raises(ValueError, match="response 1 has 0 tokens"):
        task_returns(torch.ones(2), torch.tensor([0, 2, 2]))


def test_offsets_must_start_at_zero() -> None:
    with pytest.raises(ValueError, match="offset 0"):
        task_returns(torch.ones(1), torch.tensor([1, 2]))


class TestGroups:
    rewards = torch.tensor([2.0, 0.5, 1.5, 0.0, 0.5, 0.5])
    group = torch.tensor([7, 3, 7, 7, 3, 9])  # interleaved; sizes 3, 2 and 1

    def test_no_baseline_leaves_rewards_alone(self) -> None:
        assert torch.equal(group_rewards(self.rewards, self.group, baseline="none"), self.rewards)

    def test_group_mean(self) -> None:
        mean = 3.5 / 3
        expected = torch.tensor([2 - mean, 0.0, 1.5 - mean, -mean, 0.0, 0.0])
        torch.testing.assert_close(group_rewards(self.rewards, self.group, baseline="group_mean"), expected)

    def test_leave_one_out(self) -> None:
        expected = torch.tensor([2 - 0.75, 0.0, 1.5 - 1.0, 0 - 1.75, 0.0, 0.0])
        torch.testing.assert_close(group_rewards(self.rewards, self.group, baseline="leave_one_out"), expected)

    def test_group_std(self) -> None:
        compared = group_rewards(self.rewards, self.group, baseline="group_mean", normalize=True)
        seven = self.rewards[[0, 2, 3]]
        torch.testing.assert_close(compared[[0, 2, 3]], (seven - seven.mean()) / seven.std())
        assert compared[[1, 4, 5]].tolist() == [0.0, 0.0, 0.0]  # equal samples and a lone one: no signal, no 0 / 0

    @pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
    @pytest.mark.parametrize("normalize", [False, True])
    def test_random_groups_follow_the_formula(self, baseline: Baseline, normalize: bool) -> None:
        """In float64, one group after the other: r - mean(group or others), over the group's sample deviation."""
        generator = torch.Generator().manual_seed(1)
        group = torch.randint(0, 9, (64,), generator=generator)
        rewards = torch.randint(0, 5, (64,), generator=generator) / 2
        found = group_rewards(rewards, group, baseline=baseline, normalize=normalize)
        for i, (number, reward) in enumerate(zip(group.tolist(), rewards.double().tolist(), strict=True)):
            members = rewards.double()[group == number].tolist()
            assert len(members) > 1
            mean = sum(members) / len(members)
            deviation = math.sqrt(sum((r - mean) ** 2 for r in members) / (len(members) - 1))
            others = (sum(members) - reward) / (len(members) - 1)
            expected = reward - (mean if baseline == "group_mean" else others)
            assert float(found[i]) == pytest.approx(expected / (deviation if normalize else 1.0), rel=1e-6, abs=1e-7)

    def test_normalize_without_baseline_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="group_normalize needs a group baseline"):
            group_rewards(self.rewards, self.group, baseline="none", normalize=True)
