"""What votes are worth, drawn: accuracy against generated tokens with intervals, and reliability diagrams."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_r1reward.evaluation.result import CalibrationBin, FittedCalibration, VoteBudget
from megatron_r1reward.evaluation.vote_budget import JUDGE_FILTERED
from megatron_r1reward.report.charts import COLOURS, STYLE, Drawing, LegendEntry

USUAL = ("greedy", "adaptive 0.9")  # ways of voting whose calibration is drawn, the first that was fitted


def plot_votes(axes: Axes, budget: VoteBudget) -> list[LegendEntry]:
    """Accuracy in percent against tokens per pair, one curve per method, with 95 % intervals."""
    entries = []
    methods = list(dict.fromkeys(point.method for point in budget.points))
    assert len(methods) <= len(COLOURS), f"{methods} are more than there are colours"
    for method, colour in zip(methods, COLOURS, strict=False):
        points = sorted((point for point in budget.points if point.method == method), key=lambda point: point.tokens)
        means = [100 * point.accuracy for point in points]
        below = [max(0.0, 100 * (point.accuracy - point.interval[0])) for point in points]
        above = [max(0.0, 100 * (point.interval[1] - point.accuracy)) for point in points]
        tokens = [point.tokens for point in points]
        axes.errorbar(
            tokens, means, yerr=[below, above], marker="o", markersize=3, linewidth=1.4, elinewidth=0.8, capsize=1.5,
            color=colour, label=method,
        )  # fmt: skip
        entries.append(LegendEntry(label=method, last=f"{means[-1]:.1f} %", colour=colour))
    axes.set_xscale("log")
    axes.set_xlabel("generated tokens per pair")
    axes.set_ylabel("right, %")
    return entries


def judged_votes(budget: VoteBudget) -> str | None:
    """What a consistency judge has to do with these votes, in a sentence; None: written by an earlier version."""
    if (judged := budget.judged) is None:
        return None if budget.not_judged is None else f"There are no judge-filtered votes: {budget.not_judged}."
    asked = judged.consistent + judged.inconsistent + judged.unknown
    filtered = [point for point in budget.points if point.method == JUDGE_FILTERED]
    fallbacks = ", ".join(f"{point.setting}: {point.fallbacks:.2f}" for point in filtered)
    return (
        f"Judge-filtered votes leave out the {judged.inconsistent} of {asked} samples whose reasoning does not support "
        f"the verdict, as {judged.judge} says ({judged.unknown} without an answer count). An order of which no vote is "
        f"left keeps all of its votes; such orders per pair: {fallbacks}. The judge's own work is not in the tokens."
    )


def draw_votes(budget: VoteBudget) -> Drawing:
    image, legend = _figure(lambda axes: plot_votes(axes, budget))
    note = "RL model, both orders unless said otherwise; 95 % intervals"
    return Drawing(title="Accuracy against generated tokens", note=note, legend=tuple(legend), image=image)


def draw_reliability(fits: Sequence[FittedCalibration]) -> Drawing | None:
    """Of the usual way to vote, before and after its calibration, on the items that it was not fitted on."""
    found = next((fit for way in USUAL for fit in fits if fit.votes == way), None)
    if found is None:
        return None
    curves = (("as voted", found.bins_before), ("calibrated", found.bins_after))
    errors = (found.error_before, found.error_after)

    def plot(axes: Axes) -> list[LegendEntry]:
        axes.plot([50, 100], [50, 100], color="#98a2b3", linewidth=0.8, linestyle=":")
        entries = []
        for (label, bins), error, colour in zip(curves, errors, COLOURS, strict=False):
            _plot_bins(axes, bins, colour)
            entries.append(LegendEntry(label=label, last=f"ECE {100 * error:.1f} %", colour=colour))
        axes.set_xlabel("mean probability of the verdict, %")
        axes.set_ylabel("right, %")
        return entries

    image, legend = _figure(plot)
    note = (
        f"{found.aggregator} votes, {found.votes}; fitted on {found.items} items "
        f"(temperature {found.temperature:.2f}), "
        f"shown on {found.measured_items} others; size: share of the verdicts"
    )
    return Drawing(title="Reliability", note=note, legend=tuple(legend), image=image)


def _plot_bins(axes: Axes, bins: Sequence[CalibrationBin], colour: str) -> None:
    places, right = [100 * one.confidence for one in bins], [100 * one.accuracy for one in bins]
    axes.plot(places, right, color=colour, linewidth=1.2)
    axes.scatter(places, right, s=[8 + 80 * one.share for one in bins], color=colour)


def _figure(plot: Callable[[Axes], list[LegendEntry]]) -> tuple[str, list[LegendEntry]]:
    """An SVG as a data URL, and its legend."""
    buffer = io.BytesIO()
    with matplotlib.style.context(STYLE):
        figure = Figure()
        legend = plot(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", legend
