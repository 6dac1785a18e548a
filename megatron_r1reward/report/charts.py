"""Line charts as SVG images that need no other file."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
