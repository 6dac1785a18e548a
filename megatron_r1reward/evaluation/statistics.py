"""95 % intervals: how far an accuracy could have been off with other pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, bootstrap

CONFIDENCE = 0.95
RESAMPLES = 4_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval [low, high]."""

    mean: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        return [self.low, self.high]


def bootstrap_mean(values: ArrayLike, *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Mean over pairs with a percentile bootstrap interval.

    A pair is the unit that is resampled: its two answer orders and its samples share the question and the images, so
    counting them as independent would make the interval too narrow. When all pairs have the same value the interval
    has no width: the bootstrap cannot know what other pairs would have shown.

    Args:
        values: float [P], one value per pair.

    Raises:
        ValueError: fewer than two pairs.
    """
    pairs = np.asarray(values, dtype=np.float64)
    if pairs.ndim != 1 or len(pairs) < 2:
        raise ValueError(
            f"an interval needs one value for each of at least 2 pairs, got shape {pairs.shape}: add pairs"
        )
    interval = bootstrap(
        (pairs,),
        np.mean,
        method="percentile",
        confidence_level=CONFIDENCE,
        n_resamples=resamples,
        batch=500,  # bounds the memory: 500 resamples of P values at a time
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean=float(pairs.mean()), low=float(interval.low), high=float(interval.high))


def binomial_share(successes: int, trials: int, *, method: str = "wilson") -> Estimate:
    """Share of independent trials with an exact ("exact": Clopper-Pearson) or Wilson score ("wilson") interval.

    Raises:
        ValueError: no trials.
    """
    if trials < 1:
        raise ValueError(f"a share of {trials} trials is undefined: pass at least one trial")
    interval = binomtest(successes, trials).proportion_ci(confidence_level=CONFIDENCE, method=method)
    return Estimate(mean=successes / trials, low=float(interval.low), high=float(interval.high))
