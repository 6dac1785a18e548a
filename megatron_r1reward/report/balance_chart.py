"""Label, order and length balance of a set of preferences as one picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_r1reward.report.charts import COLOURS, STYLE

_MOST_BARS = 8


def balance_svg(balance: Mapping[str, Any]) -> bytes:
    """An SVG file of `import.json`'s "balance" (`SetFigures.to_json`)."""
    buffer = io.BytesIO()
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(11.0, 5.2), layout="constrained")
        order, ratio, length, kinds = figure.subplots(2, 2).flat
        _draw_order(order, balance)
        _draw_ratio(ratio, balance)
        _draw_lengths(length, balance)
        _draw_kinds(kinds, balance)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def balance_url(balance: Mapping[str, Any]) -> str:
    """The same as a data URL, for pages without other files."""
    return f"data:image/svg+xml;base64,{base64.b64encode(balance_svg(balance)).decode('ascii')}"


def _draw_order(axes: Axes, balance: Mapping[str, Any]) -> None:
    rows = sum(balance["labels"].values())
    shares = {
        "Response 1 is better": balance["labels"]["1"] / rows,
        "first in the source is better": balance["better_first_in_source"] / rows,
        "the longer one is better": balance["longer_is_better"] / rows,
    }
    axes.barh(list(shares), list(shares.values()), color=COLOURS[: len(shares)], height=0.6)
    for place, share in enumerate(shares.values()):
        axes.text(min(share + 0.01, 0.93), place, f"{100 * share:.1f} %", va="center", fontsize=8)
    axes.axvline(0.5, color="#98a2b3", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.invert_yaxis()
    axes.set_title(f"labels and order, {rows} rows")


def _draw_ratio(axes: Axes, balance: Mapping[str, Any]) -> None:
    histogram = balance["log2_length_ratio"]
    axes.stairs(histogram["counts"], histogram["edges"], fill=True, color=COLOURS[0])
    axes.axvline(0.0, color="#98a2b3", linewidth=0.8, linestyle=":")
    axes.xaxis.set_major_formatter(lambda value, _: f"{2.0**value:g}x")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title("characters of the better response, times those of the other")


def _draw_lengths(axes: Axes, balance: Mapping[str, Any]) -> None:
    for name, colour in (("better", COLOURS[0]), ("other", COLOURS[1])):
        histogram = balance[f"log2_characters_of_{name}"]
        axes.stairs(histogram["counts"], histogram["edges"], color=colour, label=name, linewidth=1.4)
    used = np.flatnonzero(np.add(*(balance[f"log2_characters_of_{name}"]["counts"] for name in ("better", "other"))))
    edges = balance["log2_characters_of_better"]["edges"]
    axes.set_xlim(edges[used[0]] - 0.5, edges[used[-1] + 1] + 0.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{2.0**value:g}")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title("characters of a response")


def _draw_kinds(axes: Axes, balance: Mapping[str, Any]) -> None:
    found, title = balance["categories"], "categories"
    if not found:
        found, title = balance["sources"], "sources"
    if not found:
        found, title = {f"{number} images": count for number, count in balance["images"].items()}, "images in a row"
    shown = dict(sorted(found.items(), key=lambda item: -item[1])[:_MOST_BARS])
    axes.barh([name[:30] for name in shown], list(shown.values()), color=COLOURS[2], height=0.6)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    rest = len(found) - len(shown)
    axes.set_title(title + (f", the {_MOST_BARS} largest of {len(found)}" if rest else ""))
