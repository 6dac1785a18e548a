"""Which training curves the report shows, and from which metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1reward.monitor.metrics import METRICS
from megatron_r1reward.report.charts import Chart, Drawing, Scale, Series, draw


@dataclass(frozen=True, kw_only=True)
class CurveSpec:
    """One chart: metric name -> label of its curve."""

    title: str
    note: str
    metrics: Mapping[str, str]
    scale: Scale = "linear"

    def __post_init__(self) -> None:
        assert set(self.metrics) <= set(METRICS), f"unknown metrics in {self.title!r}"


_ENTROPY = CurveSpec(title="Policy entropy", note="nats per response token", metrics={"entropy": "entropy"})
_GRAD_NORM = CurveSpec(title="Gradient norm", note="before clipping", metrics={"grad_norm": "norm"})

RL_CURVES = (
    CurveSpec(
        title="Reward",
        note="R = 0.5 F + A (1 + 0.5 C)",
        metrics={
            "reward/mean": "R",
            "reward/result": "A: right answer",
            "reward/consistency": "C: consistent",
            "reward/format": "F: well formed",
        },
    ),
    CurveSpec(
        title="Held-out accuracy",
        note="mean of both answer orders",
        metrics={"heldout/accuracy": "accuracy"},
        scale="accuracy",
    ),
    CurveSpec(title="Response length", note="tokens, mean of the step", metrics={"response/mean_tokens": "tokens"}),
    CurveSpec(
        title="Tokens zeroed by the advantage filter",
        note="share of action tokens, by the sign of their advantage",
        metrics={"advantage/filtered_positive": "positive", "advantage/filtered_negative": "negative"},
        scale="share",
    ),
    CurveSpec(
        title="Ratios stopped by the clips",
        note="share of action tokens",
        metrics={"ratio/preclipped_fraction": "Pre-CLIP", "ratio/clipped_fraction": "PPO clip"},
        scale="share",
    ),
    CurveSpec(
        title="Rollout server against trainer",
        note="difference of log-probabilities in nats, log scale",
        metrics={"mismatch/max_abs": "largest", "mismatch/mean_abs": "mean"},
        scale="log",
    ),
    CurveSpec(
        title="Answers",
        note="share of parsed answers that are 1, and of responses without an answer",
        metrics={"rollout/answer_1_fraction": "answer 1", "rollout/unparsable_fraction": "no answer"},
        scale="share",
    ),
    _ENTROPY,
    _GRAD_NORM,
)

SFT_CURVES = (
    CurveSpec(title="SFT loss", note="cross-entropy in nats per response token", metrics={"sft/loss": "loss"}),
    _ENTROPY,
    _GRAD_NORM,
)


def drawings(specs: Sequence[CurveSpec], rows: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    """Charts of the metrics rows; a curve without a value to show is left out, and so is a chart without curves."""
    found = []
    for spec in specs:
        series = [_series(label, name, rows) for name, label in spec.metrics.items()]
        shown = tuple(curve for curve in series if _has_values(curve, spec.scale))
        if shown:
            found.append(draw(Chart(title=spec.title, note=spec.note, series=shown, scale=spec.scale)))
    return found


def _series(label: str, name: str, rows: Sequence[Mapping[str, Any]]) -> Series:
    """Rows that do not mention the metric are no gaps: some metrics are logged every few steps only."""
    logged = [row for row in rows if name in row]
    return Series(label=label, steps=tuple(row["step"] for row in logged), values=tuple(row[name] for row in logged))


def _has_values(series: Series, scale: Scale) -> bool:
    return any(value is not None and (scale != "log" or value > 0) for value in series.values)
