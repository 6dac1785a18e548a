"""The policy loss against the paper's worked example, the literal formula, and broken inputs."""

import math

import pytest
import torch

from megatron_r1reward.algorithm.policy_loss import (
    aggregation_weights,
    kl_estimate,
    mismatch_metrics,
    policy_loss,
    truncated_importance_weights,
)
from megatron_r1reward.config.schema import AlgorithmSection

PAPER = AlgorithmSection()
PLAIN_PPO = AlgorithmSection(preclip=False)


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestPaperExample:
    """Four tokens, the first and last far off the old policy. The paper prints the third loss, -0.5526, as -0.5."""

    old = doubles(-10.0, -0.2, -0.2, -5.0)
    advantages = doubles(-1.0, -1.0, 0.5, -0.5)

    def losses(self, config: AlgorithmSection) -> torch.Tensor:
        return policy_loss(leaf(-0.1, -0.1, -0.1, -0.1), self.old, self.advantages, config).per_token_loss.detach()

    def test_plain_ppo_explodes(self) -> None:
        losses = self.losses(PLAIN_PPO)
        torch.testing.assert_close(losses, doubles(19930.4, 1.1, -0.55, 67.1), rtol=0, atol=0.05)
        assert math.trunc(float(losses[2]) * 10) / 10 == -0.5

    def test_preclip_caps_the_first_loss(self) -> None:
        capped, *others = self.losses(PAPER).tolist()
        assert capped == pytest.approx(1000.0, rel=1e-12)
        assert others == self.losses(PLAIN_PPO).tolist()[1:]

    def test_only_the_capped_token_loses_its_gradient(self) -> None:
        log_probs = leaf(-0.1, -0.1, -0.1, -0.1)
        result = policy_loss(log_probs, self.old, self.advantages, PAPER)
        result.per_token_loss.sum().backward()
        assert log_probs.grad is not None
        assert (log_probs.grad != 0).tolist() == [False, True, True, True]
        assert result.preclipped_high.tolist() == [True, False, False, False]


CONFIGS = {
    "paper": PAPER,
    "plain": PLAIN_PPO,
    "clip_higher": AlgorithmSection(clip_low=0.1, clip_high=0.28),
    "dual_clip": AlgorithmSection(dual_clip=3.0),
    "dual_clip_without_preclip": AlgorithmSection(dual_clip=3.0, preclip=False),
    "tight_preclip": AlgorithmSection(preclip_min=0.95, preclip_max=1.05),
}


def literal_loss(
    log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, config: AlgorithmSection
) -> torch.Tensor:
    """The paper's order of operations, with torch's own min and clamp; dual clip after Ye et al. 2020."""
    d = log_probs - old
    if config.preclip:
        d = d.clamp(math.log(config.preclip_min), math.log(config.preclip_max))
    rho = d.exp()
    surrogate = torch.minimum(rho * advantages, rho.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages)
    if config.dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, config.dual_clip * advantages), surrogate)
    return -surrogate


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_the_literal_formula_on_every_branch(config: AlgorithmSection) -> None:
    grid = torch.tensor([-8.0, -3.0, -0.3, -0.07, -0.01, 0.02, 0.07, 0.2, 0.23, 0.3, 1.0, 1.2, 3.0, 8.0])
    log_ratio, advantages = (m.flatten().double() for m in torch.meshgrid(grid, torch.tensor([-2.0, -0.5, 0.5, 2.0])))
    old = torch.full_like(log_ratio, -1.0)
    ours, literal = ((old + log_ratio).clone().requires_grad_() for _ in range(2))
    result = policy_loss(ours, old, advantages, config)
    expected = literal_loss(literal, old, advantages, config)
    torch.testing.assert_close(result.per_token_loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(result.per_token_loss.sum(), ours), torch.autograd.grad(expected.sum(), literal)
    )
    # Random inputs rarely reach these branches: the grid must.
    clip_within_preclip = not config.preclip or config.preclip_max > 1 + config.clip_high
    assert bool(result.clipped_low.any()) is clip_within_preclip
    assert bool(result.clipped_high.any()) is clip_within_preclip
    assert bool(result.preclipped_low.any()) is config.preclip
    assert bool(result.preclipped_high.any()) is config.preclip


def test_masks_name_the_clip_that_binds() -> None:
    log_ratio = leaf(-8.0, 8.0, -0.5, -0.5, 0.5, 0.5, 0.0)
    advantages = doubles(1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0)
    result = policy_loss(log_ratio, torch.zeros(7), advantages, PAPER)
    result.per_token_loss.sum().backward()
    assert result.preclipped_low.nonzero().flatten().tolist() == [0]
    assert result.preclipped_high.nonzero().flatten().tolist() == [1]
    assert result.clipped_low.nonzero().flatten().tolist() == [2]
    assert result.clipped_high.nonzero().flatten().tolist() == [4]
    assert log_ratio.grad is not None
    assert (log_ratio.grad == 0).nonzero().flatten().tolist() == [0, 1, 2, 4]
    torch.testing.assert_close(result.ratio[:2], doubles(1e-3, 1e3))


def test_dual_clip_binds_only_for_negative_advantages() -> None:
    log_ratio = leaf(2.0, 2.0)
    result = policy_loss(log_ratio, torch.zeros(2), doubles(-1.0, 1.0), AlgorithmSection(dual_clip=3.0))
    torch.testing.assert_close(result.per_token_loss.detach(), doubles(3.0, -1.2))
    assert result.clipped_high.tolist() == [True, True]


@pytest.mark.parametrize("config", [PAPER, PLAIN_PPO, CONFIGS["dual_clip"]])
@pytest.mark.parametrize(
    ("log_prob", "old", "advantage", "weight"),
    [
        (math.nan, -1.0, 0.0, 1.0),
        (math.inf, -1.0, 0.0, 1.0),
        (-math.inf, -1.0, 0.0, 1.0),
        (-math.inf, -math.inf, 0.0, 1.0),
        (-1.0, -math.inf, 0.0, 1.0),
        (-1.0, math.nan, 0.0, 1.0),
        (-1.0, -1.0, math.nan, 1.0),
        (-1.0, -1.0, math.inf, 1.0),
        (math.nan, math.nan, math.nan, 1.0),
        (-1.0, -1.0, 0.0, math.nan),
        (-1.0, -math.inf, -1.0, 0.0),
    ],
)
def test_tokens_without_signal_contribute_exactly_nothing(
    config: AlgorithmSection, log_prob: float, old: float, advantage: float, weight: float
) -> None:
    log_probs = leaf(log_prob, -0.5)
    result = policy_loss(
        log_probs, doubles(old, -0.6), doubles(advantage, 1.0), config, importance_weights_R=doubles(weight, 1.0)
    )
    result.per_token_loss.sum().backward()
    assert log_probs.grad is not None
    assert float(result.per_token_loss[0]) == 0.0
    assert float(log_probs.grad[0]) == 0.0
    assert float(result.ratio[0]) == 1.0
    assert math.isfinite(float(log_probs.grad[1]))
    assert float(log_probs.grad[1]) != 0.0


@pytest.mark.parametrize(
    ("log_prob", "old", "advantage", "expected"),
    [
        (-1.0, -math.inf, -1.0, 1000.0),  # a ratio of infinity is capped at 1e3
        (-1.0, -math.inf, 1.0, -1.2),
        (-math.inf, -1.0, 1.0, -1e-3),
        (-math.inf, -1.0, -1.0, 0.8),
    ],
)
def test_preclip_tames_infinite_log_ratios(log_prob: float, old: float, advantage: float, expected: float) -> None:
    log_probs = leaf(log_prob)
    loss = policy_loss(log_probs, doubles(old), doubles(advantage), PAPER).per_token_loss
    loss.sum().backward()
    assert float(loss) == pytest.approx(expected)
    assert log_probs.grad is not None
    assert float(log_probs.grad) == 0.0


def test_a_nan_log_prob_of_an_active_token_propagates() -> None:
    assert policy_loss(leaf(math.nan), doubles(-1.0), doubles(1.0), PAPER).per_token_loss.isnan().all()


def test_importance_weights_multiply_loss_and_gradient() -> None:
    old, advantages = doubles(-1.0, -1.0, -1.0), doubles(1.0, -1.0, 0.5)
    plain, weighted = leaf(-0.9, -0.9, -1.1), leaf(-0.9, -0.9, -1.1)
    weights = doubles(0.5, 2.0, 1.5)
    plain_loss = policy_loss(plain, old, advantages, PAPER).per_token_loss
    weighted_loss = policy_loss(weighted, old, advantages, PAPER, importance_weights_R=weights).per_token_loss
    torch.testing.assert_close(weighted_loss, plain_loss * weights)
    torch.testing.assert_close(
        torch.autograd.grad(weighted_loss.sum(), weighted)[0], torch.autograd.grad(plain_loss.sum(), plain)[0] * weights
    )


def test_entropy_bonus_reaches_filtered_tokens_too() -> None:
    config = AlgorithmSection(entropy_coefficient=0.01)
    entropy = leaf(2.0, 3.0)
    loss = policy_loss(leaf(-1.0, -1.0), doubles(-1.0, -1.0), doubles(1.0, 0.0), config, entropy_R=entropy)
    loss.per_token_loss.sum().backward()
    torch.testing.assert_close(loss.per_token_loss.detach(), doubles(-1.0 - 0.02, -0.03))
    torch.testing.assert_close(entropy.grad, doubles(-0.01, -0.01))


def test_entropy_coefficient_without_entropy_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"entropy_coefficient is 0\.01"):
        policy_loss(leaf(-1.0), doubles(-1.0), doubles(1.0), AlgorithmSection(entropy_coefficient=0.01))


@pytest.mark.parametrize(
    ("estimator", "expected", "slope"),
    [
        ("k1", (0.5, -0.25), (1.0, 1.0)),
        ("k2", (0.125, 0.03125), (0.5, -0.25)),
        ("k3", (math.exp(-0.5) - 0.5, math.exp(0.25) - 1.25), (1 - math.exp(-0.5), 1 - math.exp(0.25))),
    ],
)
def test_kl_term_reaches_every_token(estimator: str, expected: tuple[float, float], slope: tuple[float, float]) -> None:
    """With g = log_prob - reference = 0.5 and -0.25; no advantage, so nothing else is in the loss."""
    config = AlgorithmSection(kl_loss_coefficient=0.1, kl_loss_estimator=estimator)
    log_probs = leaf(-1.0, -2.0)
    reference = doubles(-1.5, -1.75)
    result = policy_loss(log_probs, doubles(-1.0, -2.0), doubles(0.0, 0.0), config, reference_log_probs_R=reference)
    result.per_token_loss.sum().backward()
    torch.testing.assert_close(result.per_token_loss.detach(), 0.1 * doubles(*expected))
    torch.testing.assert_close(log_probs.grad, 0.1 * doubles(*slope))


@pytest.mark.parametrize("bound", [0.02, 1.0, 10.0])
def test_k3_is_bounded_on_both_sides_and_does_not_pull_there(bound: float) -> None:
    gap = torch.linspace(-300.0, 300.0, 6001, dtype=torch.float64)
    log_probs = gap.clone().requires_grad_()
    value = kl_estimate(log_probs, torch.zeros_like(gap), "k3", bound=bound)
    value.sum().backward()
    assert log_probs.grad is not None
    exact = (-gap).expm1() + gap
    torch.testing.assert_close(value.detach(), exact.clamp(max=bound))
    inside = exact < bound
    torch.testing.assert_close(log_probs.grad[inside], -(-gap[inside]).expm1())
    assert (log_probs.grad[exact > bound] == 0).all()


def test_the_default_bounds_a_token_that_the_policy_has_left() -> None:
    """20 nats below the reference: 4.9e8 without the bound."""
    for bound, expected in ((AlgorithmSection().kl_loss_bound, 10.0), (0.0, math.exp(20) - 21)):
        config = AlgorithmSection(kl_loss_coefficient=1.0, kl_loss_bound=bound)
        loss = policy_loss(leaf(-21.0), doubles(-21.0), doubles(0.0), config, reference_log_probs_R=doubles(-1.0))
        assert float(loss.per_token_loss) == pytest.approx(expected)


def test_kl_coefficient_without_reference_is_an_error() -> None:
    config = AlgorithmSection(kl_loss_coefficient=0.1)
    assert config.needs_reference
    with pytest.raises(ValueError, match=r"kl_loss_coefficient is 0\.1: pass reference_log_probs_R"):
        policy_loss(leaf(-1.0), doubles(-1.0), doubles(1.0), config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_gradcheck(config: AlgorithmSection) -> None:
    generator = torch.Generator().manual_seed(2)
    log_ratio = torch.randn(64, generator=generator, dtype=torch.float64) * 3
    old = -torch.rand(64, generator=generator, dtype=torch.float64)
    advantages = torch.randn(64, generator=generator, dtype=torch.float64)
    advantages[::7] = 0.0
    log_probs = (old + log_ratio).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, config).per_token_loss, log_probs)


class TestAggregation:
    offsets = torch.tensor([0, 2, 5, 6])
    losses = torch.tensor([1.0, 3.0, 1.0, 1.0, 4.0, 10.0])

    @pytest.mark.parametrize(
        ("aggregation", "expected"),
        [
            ("sequence_mean", (2.0 + 2.0 + 10.0) / 3),
            ("token_mean", 20.0 / 6),
            ("constant_length", 20.0 / 8 / 3),
        ],
    )
    def test_value(self, aggregation: str, expected: float) -> None:
        config = AlgorithmSection(aggregation=aggregation, constant_length=8)
        how = aggregation_weights(self.offsets, config)
        assert float((how.weights * self.losses).sum() / how.counts.sum()) == pytest.approx(expected)

    @pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant_length"])
    @pytest.mark.parametrize("seed", range(5))
    def test_any_split_into_micro_batches_gives_the_same_loss(self, aggregation: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        config = AlgorithmSection(aggregation=aggregation)
        lengths = torch.randint(1, 40, (24,), generator=generator)
        losses = torch.randn(int(lengths.sum()), generator=generator).split(lengths.tolist())
        cuts = torch.randint(0, 25, (5,), generator=generator).sort().values.tolist()  # empty micro-batches, too

        def sums(first: int, last: int) -> tuple[float, float]:
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[first:last].cumsum(0)])
            how = aggregation_weights(offsets, config)
            tokens = torch.cat([*losses[first:last], torch.zeros(0)])
            return float((how.weights.double() * tokens).sum()), float(how.counts.sum())

        whole_loss, whole_count = sums(0, 24)
        parts = [sums(first, last) for first, last in zip([0, *cuts], [*cuts, 24], strict=True)]
        assert sum(count for _, count in parts) == whole_count
        assert sum(loss for loss, _ in parts) / whole_count == pytest.approx(whole_loss / whole_count, rel=1e-9)


def test_equal_engines_do_not_disagree() -> None:
    log_probs = torch.tensor([-1.0, -0.3])
    gap = mismatch_metrics(log_probs, log_probs, threshold=0.5)
    assert gap == {"mean_abs": 0.0, "max_abs": 0.0, "kl": 0.0, "share_beyond": 0.0}


def test_known_gap() -> None:
    metrics = mismatch_metrics(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -0.9]), threshold=0.4)
    assert metrics["mean_abs"] == pytest.approx(0.3)
    assert metrics["max_abs"] == pytest.approx(0.5)
    assert metrics["share_beyond"] == 0.5
    assert metrics["kl"] == pytest.approx(((math.exp(0.5) - 1 - 0.5) + (math.exp(-0.1) - 1 + 0.1)) / 2, rel=1e-6)


def test_kl_estimates_the_divergence_of_sampler_from_trainer() -> None:
    sampler, trainer = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.6, 0.25, 0.15])
    drawn = torch.multinomial(sampler, 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = mismatch_metrics(trainer.log()[drawn], sampler.log()[drawn], threshold=0.5)["kl"]
    assert estimate == pytest.approx(float((sampler * (sampler / trainer).log()).sum()), rel=0.05)


def test_what_is_no_number_counts_as_beyond() -> None:
    metrics = mismatch_metrics(torch.tensor([-1.0, math.nan, -math.inf, -2.0]), torch.full((4,), -1.0), threshold=1.0)
    assert metrics["share_beyond"] == 0.5


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 tokens"):
        mismatch_metrics(torch.zeros(0), torch.zeros(0), threshold=0.5)


def test_truncated_weights() -> None:
    trainer = torch.tensor([-1.0, -1.0, -1.0, -math.inf], requires_grad=True)
    weights = truncated_importance_weights(trainer, torch.tensor([-1.0, -3.0, -math.inf, -1.0]), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 2.0, 0.0]))
    assert not weights.requires_grad
