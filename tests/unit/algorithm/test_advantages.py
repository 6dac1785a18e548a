"""The advantage filter: the paper's rule and the released code's, told apart by batches of known accuracy."""

import math

import pytest
import torch

from megatron_r1reward.algorithm.advantages import AdvantageResult, normalize_and_filter
from megatron_r1reward.config.schema import AlgorithmSection

RIGHT, WRONG = 2.0, 0.5  # rewards of a well-formed response


def batch(p: float, tokens: int) -> torch.Tensor:
    """Returns of `tokens` tokens, a fraction p of them in right responses; the right ones come first."""
    right = round(p * tokens)
    return torch.tensor([RIGHT] * right + [WRONG] * (tokens - right))


def run(returns: torch.Tensor, **settings: object) -> AdvantageResult:
    return normalize_and_filter(returns, AlgorithmSection(**settings))


# p, tokens, raw mean, z of wrong tokens, z of right tokens, wrong tokens kept by the released code, and by the paper.
TABLE = [
    (0.50, 100, 1.25, -1.00, 1.00, True, True),
    (0.68, 100, 1.52, -1.46, 0.69, True, True),
    (0.69, 100, 1.535, -1.49, 0.67, False, True),
    (0.80, 100, 1.70, -2.00, 0.50, False, True),
    (0.90, 100, 1.85, -3.00, 0.33, False, True),  # the boundary: the paper keeps |z| <= 3
    (0.95, 100, 1.925, -4.36, 0.23, False, False),
    (255 / 256, 256, 1.994, -15.97, 0.06, False, False),  # the paper's own example
]


@pytest.mark.parametrize(("p", "tokens", "mean", "z_wrong", "z_right", "kept_code", "kept_paper"), TABLE)
class TestTable:
    def test_statistics_and_z(self, p, tokens, mean, z_wrong, z_right, kept_code, kept_paper) -> None:
        result = run(batch(p, tokens), filter="none")
        assert result.mean == pytest.approx(mean, abs=5e-4)
        assert result.std == pytest.approx(1.5 * math.sqrt(p * (1 - p)), rel=1e-6)
        assert float(result.advantages[-1]) == pytest.approx(z_wrong, abs=5e-3)
        assert float(result.advantages[0]) == pytest.approx(z_right, abs=5e-3)
        assert not result.filtered_mask.any()

    @pytest.mark.parametrize("rule", ["paper", "released_code"])
    def test_which_tokens_are_kept(self, p, tokens, mean, z_wrong, z_right, kept_code, kept_paper, rule) -> None:
        result = run(batch(p, tokens), filter=rule)
        wrong_kept = kept_paper if rule == "paper" else kept_code
        assert bool(result.filtered_mask[-1]) is not wrong_kept
        assert float(result.advantages[-1]) == pytest.approx(z_wrong if wrong_kept else 0.0, abs=5e-3)
        assert not result.filtered_mask[0]
        assert float(result.advantages[0]) == pytest.approx(z_right, abs=5e-3)


def test_filtered_is_exactly_zero_and_not_clamped() -> None:
    result = run(torch.tensor([0.0] * 99 + [1.0]))
    assert result.filtered_mask.tolist() == [False] * 99 + [True]
    assert float(result.advantages[-1]) == 0.0
    assert float(result.advantages[0]) == pytest.approx(-0.1, abs=1e-2)


@pytest.mark.parametrize(("p", "tokens"), [(0.8, 100), (0.95, 100), (255 / 256, 256)])
def test_clamped_evidence_keeps_its_sign_and_a_bounded_weight(p: float, tokens: int) -> None:
    """Above 90 % right the paper's rule leaves no negative evidence; clamped, what is wrong is still learned from."""
    plain, result = run(batch(p, tokens), filter="none"), run(batch(p, tokens), filter="clamp")
    assert torch.equal(result.advantages, plain.advantages.clamp(-3, 3))
    assert not result.filtered_mask.any()
    assert float(result.advantages[-1]) == pytest.approx(max(-3.0, -math.sqrt(p / (1 - p))), abs=1e-4)
    raw = run(batch(p, tokens), filter="clamp", normalize="none").advantages
    torch.testing.assert_close((raw - result.mean) / result.std, result.advantages, rtol=1e-5, atol=1e-5)


# Share of the evidence that is negative, by rule: the second table of docs/algorithm.md.
SHARES = [
    (0.80, 100, {"none": 50, "clamp": 50, "paper": 50, "released_code": 0}),
    (0.95, 100, {"none": 50, "clamp": 41, "paper": 0, "released_code": 0}),
    (0.98, 100, {"none": 50, "clamp": 30, "paper": 0, "released_code": 0}),
    (255 / 256, 256, {"none": 50, "clamp": 16, "paper": 0, "released_code": 0}),
]


@pytest.mark.parametrize(("p", "tokens", "shares"), SHARES)
def test_how_much_evidence_is_negative_under_each_rule(p: float, tokens: int, shares: dict[str, int]) -> None:
    for rule, share in shares.items():
        advantages = run(batch(p, tokens), filter=rule).advantages
        negative = -advantages.clamp(max=0).sum() / advantages.abs().sum()
        assert round(100 * float(negative)) == share, rule


def test_filter_sigma() -> None:
    returns = batch(0.8, 100)  # z_wrong = -2
    assert run(returns, filter_sigma=1.9).filtered_mask.sum() == 20
    assert run(returns, filter_sigma=2.1).filtered_mask.sum() == 0


@pytest.mark.parametrize(("tokens", "z", "kept"), [(82, 9.0, True), (122, 11.0, False)])
def test_released_code_also_has_an_absolute_bound(tokens: int, z: float, kept: bool) -> None:
    returns = torch.tensor([9.0] * (tokens - 1) + [10.0])  # mean 9: its interval, [6, 12], keeps both z
    assert float(run(returns, filter="none").advantages[-1]) == pytest.approx(z)
    result = run(returns, filter="released_code")
    assert bool(result.filtered_mask[-1]) is not kept
    assert result.filtered_mask[:-1].all()  # z = -0.1 is far below the mis-centred interval


@pytest.mark.parametrize("rule", ["paper", "released_code", "clamp", "none"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_token_is_filtered_and_does_not_erase_the_batch(rule: str, broken: float) -> None:
    clean = batch(0.5, 10)
    expected = run(clean, filter=rule)
    result = run(torch.cat([clean, torch.tensor([broken])]), filter=rule)
    assert (result.mean, result.std) == (expected.mean, expected.std)
    assert torch.equal(result.advantages[:-1], expected.advantages)
    assert bool(result.filtered_mask[-1])
    assert float(result.advantages[-1]) == 0.0


def test_equal_rewards_give_no_signal() -> None:
    result = run(torch.full((8,), 1.5))
    assert result.advantages.tolist() == [0.0] * 8
    assert result.std == pytest.approx(1e-4)  # sqrt of the variance floor


def test_without_normalisation_the_raw_return_trains_and_z_is_judged() -> None:
    result = run(batch(0.95, 100), normalize="none")
    assert result.advantages.tolist() == [2.0] * 95 + [0.0] * 5


def test_statistics_are_token_weighted_and_accurate() -> None:
    returns = 1e4 + torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    result = run(returns, filter="none")
    assert result.mean == pytest.approx(float(returns.double().mean()), rel=1e-12)
    assert result.std == pytest.approx(float(returns.double().std(correction=0)), rel=1e-12)


def test_no_tokens() -> None:
    assert run(torch.zeros(0)).advantages.shape == (0,)
