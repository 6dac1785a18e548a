import numpy as np
import pytest

from megatron_r1reward.evaluation.statistics import binomial_share, bootstrap_mean


def test_bootstrap_is_seeded_and_encloses_the_mean() -> None:
    values = np.random.default_rng(0).random(200)
    first, again = bootstrap_mean(values, seed=1), bootstrap_mean(values, seed=1)
    assert first == again
    assert first != bootstrap_mean(values, seed=2)
    assert first.mean == pytest.approx(values.mean())
    assert first.low < first.mean < first.high
    assert first.interval == [first.low, first.high]


def test_bootstrap_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).random(400)
    estimate = bootstrap_mean(values, seed=0)
    width = 2 * 1.96 * values.std() / np.sqrt(len(values))
    assert estimate.high - estimate.low == pytest.approx(width, rel=0.1)


def test_the_interval_covers_the_truth_about_95_times_of_100() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        estimate = bootstrap_mean(generator.random(100) < 0.7, seed=seed, resamples=400)
        covered += estimate.low <= 0.7 <= estimate.high
    assert 180 <= covered <= 199


@pytest.mark.parametrize("values", [[], [0.5], [[0.5, 0.5]]])
def test_fewer_than_two_pairs_have_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 2 pairs"):
        bootstrap_mean(values, seed=0)


def test_binomial_intervals_match_published_values() -> None:
    exact = binomial_share(0, 10, method="exact")
    assert (exact.mean, exact.low) == (0.0, 0.0)
    assert exact.high == pytest.approx(1 - 0.025 ** (1 / 10))  # Clopper-Pearson at zero successes
    benchmark = binomial_share(899, 1250)  # R1-Reward on VL-RewardBench: 71.92 %, about +- 2.5 points
    assert benchmark.mean == 0.7192
    assert benchmark.high - benchmark.low == pytest.approx(0.05, abs=0.002)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 trials"):
        binomial_share(0, 0)
