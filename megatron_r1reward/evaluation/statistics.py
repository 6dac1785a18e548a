"""95 % intervals: how far a figure could have been off with other items.

The unit is the item, a question about images: its pairs, answer orders and samples share it, so counting them as
independent would make every interval too narrow. Measured coverage: tests/unit/evaluation/test_statistics.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 2_000
# Pseudo-items, right and wrong, in the variance of a share. Without them a small sample of items that all went well
# says that no other item would go badly.
_PSEUDO_ITEMS = 0.06


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval [low, high]."""

    mean: float
    low: float
    high: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high


def estimate_share(values: ArrayLike, items: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of values in [0, 1] with a score interval.

    Independent zeros and ones: Wilson's. Else Wilson's with the effective sample size p (1 - p) / var(mean), the
    variance being that of the items' sums (Korn and Graubard, Survey Methodology 24, 1998). The quantile stays the
    normal one: with Student's the interval, which is no Wald interval, covers 97 % and more of 20 items.

    Args:
        values: float [P], e.g. the accuracy of each pair.
        items: P keys; pairs with equal keys are of one item. None: every pair is an item.

    Raises:
        ValueError: no value, or lengths that differ.
    """
    values_P, sums_I, sizes_I = _by_item(values, items)
    total, share, count = len(values_P), float(values_P.mean()), len(sums_I)
    spread = share * (1.0 - share)
    from scipy.special import ndtri  # readers of results do without

    quantile = float(ndtri(0.5 + CONFIDENCE / 2))
    if count == total and np.isin(values_P, (0.0, 1.0)).all():
        inverse = quantile**2 / total
    elif count == 1:  # one item says nothing about others
        return Estimate(mean=share, low=0.0, high=1.0)
    else:
        squares = float(((sums_I - share * sizes_I) ** 2).sum())
        squares += _PSEUDO_ITEMS * (total / count) ** 2 * (share**2 + (1.0 - share) ** 2)
        variance = squares / (1.0 + 2.0 * _PSEUDO_ITEMS / count) * count / (count - 1) / total**2
        effective = spread / variance if spread > 0.0 else count
        inverse = quantile**2 / effective
    centre = (share + inverse / 2.0) / (1.0 + inverse)
    half = float(np.sqrt(spread * inverse + inverse**2 / 4.0)) / (1.0 + inverse)
    return Estimate(mean=share, low=max(0.0, centre - half), high=min(1.0, centre + half))


def estimate_mean(values: ArrayLike, items: Sequence[Hashable] | None = None, *, seed: int) -> Estimate:
    """The mean of any values with a BCa bootstrap interval over items (Efron, JASA 82, 1987); arguments as above.

    When all items have the same mean the interval has no width: resampling cannot know what others would have shown.
    """
    values_P, sums_I, sizes_I = _by_item(values, items)
    mean = float(values_P.mean())
    means_I = sums_I / sizes_I
    if len(means_I) < 2 or np.ptp(means_I) == 0.0:
        return Estimate(mean=mean, low=mean, high=mean)
    from scipy.stats import bootstrap

    interval = bootstrap(
        (sums_I, sizes_I),
        lambda sums, sizes, axis: sums.sum(axis=axis) / sizes.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="BCa",
        confidence_level=CONFIDENCE,
        n_resamples=RESAMPLES,
        batch=500,  # bounds the memory: 500 resamples at a time
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean=mean, low=float(interval.low), high=float(interval.high))


def _by_item(
    values: ArrayLike, items: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The values [P], and the items' sums and sizes [I]."""
    values_P = np.asarray(values, dtype=np.float64)
    if values_P.ndim != 1 or len(values_P) < 1 or (items is not None and len(items) != len(values_P)):
        raise ValueError(f"an interval needs one value for each pair, got shape {values_P.shape}: add pairs")
    if items is None:
        return values_P, values_P, np.ones(len(values_P))
    numbers: dict[Hashable, int] = {}
    index_P = [numbers.setdefault(item, len(numbers)) for item in items]
    sizes_I = np.asarray(np.bincount(index_P), dtype=np.float64)
    return values_P, np.asarray(np.bincount(index_P, weights=values_P), dtype=np.float64), sizes_I
