"""Intervals that hold: coverage in simulation, at the sizes of the published benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from megatron_r1reward.evaluation.statistics import estimate_mean, estimate_share

REPEATS = 600  # of a share: two standard errors are 1.8 points, 0.8 of the mean over all shares
SHARES = (0.6, 0.7, 0.8, 0.9, 0.95)


def coverage(
    draw: Callable[[np.random.Generator], np.ndarray],
    truth: float,
    items: list[int] | None = None,
    *,
    repeats: int = REPEATS,
) -> float:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(repeats):
        estimate = estimate_share(draw(generator), items)
        covered += estimate.low <= truth <= estimate.high
    return covered / repeats


def exact_coverage(items: int, share: float) -> float:
    """Of one verdict per item: over all numbers of right ones."""
    right = np.arange(items + 1)
    found = [estimate_share([1.0] * int(r) + [0.0] * (items - int(r))) for r in right]
    covered = np.array([estimate.low <= share <= estimate.high for estimate in found])
    from scipy.stats import binom

    return float(binom.pmf(right[covered], items, share).sum())


@pytest.mark.parametrize("items", [20, 46, 170])
def test_independent_items_are_covered_at_small_sizes(items: int) -> None:
    """With few items no interval can hold 95 % at every share: the verdicts are whole numbers. On average it does."""
    covered = [exact_coverage(items, share) for share in (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)]
    assert 0.93 <= np.mean(covered) <= 0.97, covered
    assert min(covered) >= 0.92


def test_46_items_of_which_95_in_100_are_right() -> None:
    assert exact_coverage(46, 0.95) == pytest.approx(0.9737, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("items", [20, 46, 170])
@pytest.mark.parametrize("samples", [2, 30])
def test_items_with_several_verdicts_are_covered(items: int, samples: int) -> None:
    """Both orders and several samples: an item has an accuracy of its own between 0 and 1."""

    def draw(generator: np.random.Generator, share: float) -> np.ndarray:
        accuracies = generator.beta(share, 1 - share, size=items)
        return generator.binomial(samples, accuracies) / samples

    covered = [coverage(lambda generator, p=share: draw(generator, p), share) for share in SHARES]
    assert 0.93 <= np.mean(covered) <= 0.97, covered
    assert min(covered) >= 0.91
    assert max(covered) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(("count", "pairs"), [(20, 60), (46, 170), (170, 500)])
@pytest.mark.parametrize("spread", [0.05, 0.3, 0.6, 0.9])
def test_pairs_of_the_same_item_are_not_independent(count: int, pairs: int, spread: float) -> None:
    """46 ids with 170 pairs are those of MM-RLHF-RewardBench; `spread`: correlation between the pairs of an item."""
    sizes = np.full(count, pairs // count)
    sizes[: pairs % count] += 1
    items = np.repeat(np.arange(count), sizes).tolist()
    concentration = 1 / spread - 1

    def draw(generator: np.random.Generator, share: float) -> np.ndarray:
        accuracies = generator.beta(share * concentration, (1 - share) * concentration, size=count)
        return generator.random(pairs) < np.repeat(accuracies, sizes)

    covered = [coverage(lambda generator, p=share: draw(generator, p), share, items) for share in SHARES]
    assert 0.93 <= np.mean(covered) <= 0.97, covered
    assert min(covered) >= 0.91
    assert max(covered) <= 0.99
    if spread == 0.9:
        independent = coverage(lambda generator: draw(generator, 0.8), 0.8, repeats=200)
        assert independent < 0.8, "counting pairs instead of items covers far less"


def test_known_intervals() -> None:
    benchmark = estimate_share([1.0] * 899 + [0.0] * 351)  # R1-Reward on VL-RewardBench, about +- 2.5 points
    assert benchmark.mean == 0.7192
    assert benchmark.interval == pytest.approx((0.6936, 0.7434), abs=1e-4)  # Wilson's
    assert estimate_share([1.0] * 10).interval == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert estimate_share([0.5], [0]).interval == (0.0, 1.0)
    mixed = estimate_share([1.0, 0.5] * 200)
    assert mixed.high - mixed.low == pytest.approx(2 * 1.96 * 0.25 / np.sqrt(400), rel=0.02)


def test_the_bootstrap_is_seeded_and_goes_by_item() -> None:
    values = np.random.default_rng(0).exponential(size=200)
    first = estimate_mean(values, seed=1)
    assert first == estimate_mean(values, seed=1) != estimate_mean(values, seed=2)
    assert first.low < first.mean < first.high
    width = 2 * 1.96 * values.std() / np.sqrt(200)
    assert first.high - first.low == pytest.approx(width, rel=0.15)
    fourfold = estimate_mean(np.repeat(values, 4), np.repeat(np.arange(200), 4).tolist(), seed=1)
    assert fourfold.interval == pytest.approx(first.interval, rel=1e-6)
    assert estimate_mean([3.0, 3.0], seed=0).interval == (3.0, 3.0)


@pytest.mark.parametrize("values", [[], [[0.5, 0.5]]])
def test_nothing_has_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match="one value for each pair"):
        estimate_share(values)
