"""Probabilities that are right as often as they say: measured, fitted on half of the items, carried by the folder.

    p of every verdict --reliability--> bins, expected calibration error
    one half of the items --temperature by maximum likelihood--> the other half: error before and after
    evaluation.json --`r1reward calibrate`--> reward_model.json --> `Comparison.calibrated`, /v1/compare

One parameter: log-odds are divided by a temperature (Guo et al., 2017). An intercept would prefer a place, and
exchanging two responses must exchange their probabilities.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.evaluation.result import CalibrationBin, EvaluationResult, FittedCalibration
from megatron_r1reward.files import write_text
from megatron_r1reward.judging.votes import Aggregator
from megatron_r1reward.model_folder.prompt_policy import FILE, Calibration, own_policy

Floats = NDArray[np.float64]
BINS = 5  # of the confidence in the verdict, from 1/2 to 1
_RANGE = (math.log(0.05), math.log(20.0))  # of log temperature: where no verdict is wrong the likelihood has no maximum
_MIN_ITEMS = 20  # in each half


def calibration(p_right: Floats) -> tuple[float | None, tuple[CalibrationBin, ...]]:
    """Expected calibration error of verdicts, and the reliability diagram's bins that hold any.

    Args:
        p_right: [M], probability that was given to the right response; NaN (no vote) is left out.
    """
    known = p_right[~np.isnan(p_right)]
    if known.size == 0:
        return None, ()
    bins = tuple(_bins(np.maximum(known, 1 - known), np.where(known == 0.5, 0.5, known > 0.5)))
    return sum(one.share * abs(one.confidence - one.accuracy) for one in bins), bins


def _bins(confidence: Floats, right: Floats) -> Iterator[CalibrationBin]:
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    for number in range(BINS):
        if (held := place == number).any():
            yield CalibrationBin(
                confidence=float(confidence[held].mean()), accuracy=float(right[held].mean()), share=float(held.mean())
            )


def fit_temperature(p_right: Floats) -> float:
    """The temperature under which the right responses are likeliest; within [0.05, 20]. `p_right` [M], none NaN."""
    from scipy.optimize import minimize_scalar  # takes a third of a second

    odds = np.log(p_right) - np.log1p(-p_right)
    found = minimize_scalar(
        lambda log_t: float(np.logaddexp(0.0, -odds / math.exp(log_t)).mean()), bounds=_RANGE, method="bounded"
    )
    return math.exp(float(found.x))


def fit_halves(
    p_right: Floats, items: Sequence[Hashable], *, aggregator: Aggregator, votes: str, seed: int
) -> FittedCalibration | None:
    """Fit on one half of the items, measure on the other.

    Args:
        p_right: [P, R], R repetitions of P pairs in (0, 1); NaN without a vote.
        items: P keys; pairs of one item are in the same half.

    Returns:
        None where a half has too few items.
    """
    fitted = np.array([_in_first_half(item, seed) for item in items])
    halves = [{item for item, first in zip(items, fitted, strict=True) if first == side} for side in (True, False)]
    fit, measure = (part[~np.isnan(part)] for part in (p_right[fitted], p_right[~fitted]))
    if min(map(len, halves)) < _MIN_ITEMS or fit.size == 0 or measure.size == 0:
        return None
    temperature = fit_temperature(fit)
    before, before_bins = calibration(measure)
    after, after_bins = calibration(apply_temperature(measure, temperature))
    assert before is not None and after is not None
    return FittedCalibration(
        aggregator=aggregator,
        votes=votes,
        temperature=temperature,
        items=len(halves[0]),
        measured_items=len(halves[1]),
        error_before=before,
        error_after=after,
        bins_before=before_bins,
        bins_after=after_bins,
    )


def apply_temperature(p: Floats, temperature: float) -> Floats:
    return 1.0 / (1.0 + np.exp(-(np.log(p) - np.log1p(-p)) / temperature))


def _in_first_half(item: Hashable, seed: int) -> bool:
    """By content, so that the halves of two models' evaluations are the same."""
    return bool(hashlib.blake2b(f"{seed}\0{item!r}".encode("utf-8", "surrogatepass"), digest_size=1).digest()[0] & 1)


def calibrate_folder(folder: Path, evaluation: Path) -> tuple[Calibration, ...]:
    """Let the folder carry the calibrations of an `evaluation.json` that was measured on its own weights.

    Raises:
        ValueError: it says nothing about how it is asked, or the evaluation is of other weights or fitted none.
    """
    policy = own_policy(folder)
    if policy.reads_one_response:
        raise ValueError(
            f"{folder} is a {policy.kind} reward model, which has no votes to calibrate: its calibration error is in "
            f"{evaluation}"
        )
    try:
        result = EvaluationResult.model_validate_json(evaluation.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{evaluation} is no evaluation.json of `r1reward eval`: {error}") from error
    weights = model_identity(folder)
    if result.weights != weights:
        raise ValueError(
            f"{evaluation} was measured on other weights than those in {folder}: run `r1reward eval` with "
            f"model.path={folder}"
        )
    fits = result.vote_budget.fits if result.vote_budget is not None else ()
    if not fits:
        raise ValueError(f"{evaluation} has fitted no calibration: evaluate at least {2 * _MIN_ITEMS} items")
    kept = tuple(
        Calibration(
            weights=weights,
            aggregator=fit.aggregator,
            votes=fit.votes,
            temperature=fit.temperature,
            items=fit.items,
            error_before=fit.error_before,
            error_after=fit.error_after,
        )
        for fit in fits
    )
    write_text(folder / FILE, policy.model_copy(update={"calibration": kept}).to_json())
    return kept
