"""Charts as SVG images that need no other file: curves, and what ran when during a few steps of RL (servers, judge and
trainer, one lane per phase)."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

SMOOTH_FROM = 30  # points: shorter curves are shown as they are
COLOURS = ("#2f6fde", "#e07b1a", "#12946f", "#a347b8", "#b3363e")

STYLE = Path(__file__).parent / "templates" / "chart.mplstyle"

Scale = Literal["linear", "share", "accuracy", "log"]
LANES = {
    "generate": "servers: generate",
    "score": "judge: score",
    "wait": "trainer: wait",
    "log_probs": "trainer: log-probs",
    "update": "trainer: update",
    "push": "trainer: push",
    "heldout": "trainer: held-out",
    "save": "trainer: save",
}
SERVER = re.compile(r"(rollout|judge)-\d+")  # a lane per server: when it had something to do
TRAINING = ("log_probs", "update")
SHOWN_STEPS = 6
_WAITING = "#c9ced8"


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve; a value of None (not finite when it was logged) leaves a gap."""

    label: str
    steps: tuple[int, ...]
    values: tuple[float | None, ...]

    @property
    def last(self) -> float | None:
        return next((value for value in reversed(self.values) if value is not None), None)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over steps, at most one per colour.

    `share` and `accuracy` are shown in percent: a share from 0 up, an accuracy of two choices from 50 % (chance) or, if
    it is worse, from there. Values <= 0 are gaps on a log axis.
    """

    title: str
    note: str
    series: tuple[Series, ...]
    scale: Scale = "linear"


@dataclass(frozen=True, kw_only=True)
class LegendEntry:
    label: str
    last: str
    colour: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A chart ready for the page: its curves as an SVG data URL, title and legend to be set by the page."""

    title: str
    note: str
    legend: tuple[LegendEntry, ...]
    image: str


def draw(chart: Chart) -> Drawing:
    assert 1 <= len(chart.series) <= len(COLOURS), f"{chart.title!r} has {len(chart.series)} curves"
    buffer = io.BytesIO()
    with matplotlib.style.context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        for series, colour in zip(chart.series, COLOURS, strict=False):
            _plot(axes, series, colour)
        _set_scale(axes, chart.scale)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Drawing(
        title=chart.title,
        note=chart.note,
        legend=tuple(
            LegendEntry(label=series.label, last=_text(series.last, chart.scale), colour=colour)
            for series, colour in zip(chart.series, COLOURS, strict=False)
        ),
        image=f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}",
    )


def _plot(axes: Axes, series: Series, colour: str) -> None:
    values = np.array([math.nan if value is None else value for value in series.values], dtype=np.float64)
    marker = "o" if len(values) < SMOOTH_FROM else None
    if marker is None:
        axes.plot(series.steps, values, color=colour, linewidth=0.8, alpha=0.4, clip_on=False)
        values = _moving_average(values)
    axes.plot(series.steps, values, color=colour, linewidth=1.7, marker=marker, markersize=2.6, clip_on=False)


def _set_scale(axes: Axes, scale: Scale) -> None:
    round_steps = [1, 2, 2.5, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=round_steps))
    if scale == "log":
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        return
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=round_steps))
    low, high = axes.get_ylim()
    if scale == "share":
        axes.set_ylim(0.0, max(high, 0.01))
    elif scale == "accuracy":
        axes.set_ylim(min(low, 0.5), high)
    if scale != "linear":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def _moving_average(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean of the known values over about a tenth of the curve.

    NaN in the gaps and at the ends: cut off on one side, the window would bend a rising curve.
    """
    reach = len(values) // 20
    window = np.ones(2 * reach + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window, mode="same")
    smooth = np.where(known, total / np.maximum(np.convolve(known, window, mode="same"), 1.0), math.nan)
    smooth[:reach] = smooth[len(smooth) - reach :] = math.nan
    return smooth


def _text(value: float | None, scale: Scale) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.3g} %" if scale in {"share", "accuracy"} else f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class TimelineDrawing:
    """`overlap`: share of the time of generation during which the trainer computed, over the whole run."""

    image: str  # SVG data URL
    first_step: int
    last_step: int
    overlap: float


def draw_timeline(rows: Sequence[Mapping[str, Any]]) -> TimelineDrawing | None:
    """Draw some steps from the middle of the run; None when there is no step with training and generation.

    Args:
        rows: of `monitor.timers.Timeline`.
    """
    rows = [row for row in rows if row["phase"] in LANES or SERVER.fullmatch(row["phase"])]
    trained = sorted({int(row["step"]) for row in rows if row["phase"] in TRAINING})
    if not trained or not any(row["phase"] == "generate" for row in rows):
        return None
    first = max((len(trained) - SHOWN_STEPS + 1) // 2, 0)  # the very first steps warm up
    steps = trained[first : first + SHOWN_STEPS]
    sampling = {row["phase"] for row in rows if SERVER.fullmatch(row["phase"])} | {"generate", "score"}
    own = [row for row in rows if row["step"] in steps and row["phase"] not in sampling]
    start, end = min(row["start"] for row in own), max(row["end"] for row in own)
    least = 1e-3 * (end - start)  # what is shorter cannot be seen
    shown = [row for row in rows if row["end"] > start and row["start"] < end and row["end"] - row["start"] > least]
    return TimelineDrawing(
        image=_svg(shown, start, end), first_step=steps[0], last_step=steps[-1], overlap=overlap(rows)
    )


def overlap(rows: Sequence[Mapping[str, Any]]) -> float:
    """Share of the time in which something was being generated during which the trainer computed."""
    generating = _union([(row["start"], row["end"]) for row in rows if row["phase"] == "generate"])
    training = _union([(row["start"], row["end"]) for row in rows if row["phase"] in TRAINING])
    shared = sum(max(0.0, min(b, d) - max(a, c)) for a, b in generating for c, d in training)
    return shared / max(sum(b - a for a, b in generating), 1e-9)


def _union(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times as disjoint intervals."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _svg(rows: Sequence[Mapping[str, Any]], start: float, end: float) -> str:
    shown = {row["phase"] for row in rows}
    servers = sorted((phase for phase in shown if SERVER.fullmatch(phase)), key=lambda p: (p[0] == "j", len(p), p))
    lanes = [*servers, *(phase for phase in LANES if phase in shown)]
    buffer = io.BytesIO()
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(10.0, 0.34 * len(lanes) + 0.5))
        axes = figure.subplots()
        for row in rows:
            left, right = max(row["start"], start) - start, min(row["end"], end) - start
            colour = _WAITING if row["phase"] == "wait" else COLOURS[row["step"] % len(COLOURS)]
            lane = lanes.index(row["phase"])
            axes.broken_barh([(left, right - left)], (lane - 0.38, 0.76), facecolors=colour, linewidth=0)
            if right - left > 0.025 * (end - start) and row["phase"] != "wait":
                axes.text((left + right) / 2, lane, str(row["step"]), ha="center", va="center", color="white")
        axes.set_yticks(range(len(lanes)), [LANES.get(lane, lane) for lane in lanes])
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        axes.set_xlim(0.0, end - start)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} s")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
