"""The pictures of `stability.py`: accuracy after each stress, gradients; votes of the demo's models beside coins."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_r1reward.report.charts import COLOURS, STYLE

Cells = Sequence[Mapping[str, Any]]
_TITLES = {
    "none": "the demo's settings",
    "late": "late, on what it knows",
    "late_rate": "late, 10 times the rate",
    "epochs": "4 epochs per batch",
    "rate": "10 times the rate, no gradient clip",
    "stale": "samples 4 steps old",
}


def draw_pictures(folder: Path, cells: Cells, rows: Cells) -> None:
    """`stability_accuracy.svg` and `stability_gradients.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    stresses = list(dict.fromkeys(row["stress"] for row in rows))
    methods = dict.fromkeys(row["method"] for row in rows)
    colours = dict(zip(methods, matplotlib.colormaps["tab10"].colors * 2, strict=False))
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(2.6 * len(stresses) + 1.2, 3.4))
        for axes, stress in zip(_row_of(figure, len(stresses)), stresses, strict=True):
            _accuracy(axes, stress, [row for row in rows if row["stress"] == stress])
        _save(figure, folder / "stability_accuracy.svg")
        figure = Figure(figsize=(2.6 * len(stresses) + 1.2, 2.6))
        for axes, stress in zip(_row_of(figure, len(stresses)), stresses, strict=True):
            _gradients(axes, stress, [cell for cell in cells if cell["stress"] == stress], colours)
        lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(lines.values(), lines.keys(), fontsize=7, frameon=False, loc="outside right center")
        _save(figure, folder / "stability_gradients.svg")


def _row_of(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="svg", metadata={"Date": None})


def _accuracy(axes: Axes, stress: str, rows: Cells) -> None:
    """Greedy accuracy with its interval over seeds; the line is where it began, red is a method with a collapse."""
    for place, row in enumerate(rows):
        low, high = row["greedy_interval"]
        colour = COLOURS[4] if row["collapses"] else COLOURS[0]
        if math.isfinite(low):
            axes.plot([100 * max(low, 0.0), 100 * min(high, 1.0)], [place, place], color=colour, linewidth=1.4)
        axes.plot([100 * row["greedy"]], [place], "o", color=colour, markersize=4)
    axes.axvline(100 * rows[0]["greedy_start"], color="#667085", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.invert_yaxis()
    axes.set_title(_TITLES.get(stress, stress), fontsize=8)
    axes.set_xlabel("greedy accuracy, %")


def _gradients(axes: Axes, stress: str, cells: Cells, colours: Mapping[str, Any]) -> None:
    """Gradient norm (before clipping) by step, mean over seeds."""
    for method in dict.fromkeys(cell["method"] for cell in cells):
        curves = [cell["curves"]["grad_norm"] for cell in cells if cell["method"] == method]
        means = [
            statistics.fmean(math.nan if value is None else value for value in step)
            for step in zip(*curves, strict=False)
        ]
        axes.plot(range(1, len(means) + 1), means, color=colours[method], linewidth=1.0, label=method)
    axes.set_yscale("log", nonpositive="mask")
    axes.set_title(_TITLES.get(stress, stress), fontsize=8)
    axes.set_xlabel("step")


def voting_rows(demo: Path) -> list[dict[str, Any]]:
    """Voting@k and any-correct@k of the demo's evaluations, beside a fair coin's, and beside what samples would reach
    that are as often right as the model's, but independently of each other and of the question."""
    rows = []
    for stage in ("sft", "rl"):
        found = json.loads((demo / f"eval_{stage}" / "evaluation.json").read_text())
        for k, voting in found["voting"].items():
            rows.append(
                {
                    "model": stage, "k": int(k), "voting": voting, "voting_interval": found["voting_intervals"][k],
                    "any_correct": found["any_correct"][k],
                    "any_correct_interval": found["any_correct_intervals"][k],
                    "coin_voting": 0.5, "coin_any_correct": 1.0 - 0.5 ** int(k),
                    "independent_voting": majority(found["accuracy"], int(k)),
                    "independent_any_correct": 1.0 - (1.0 - found["accuracy"]) ** int(k),
                }
            )  # fmt: skip
    return rows


def majority(share: float, votes: int) -> float:
    """How often most of so many independent votes are right; a tie counts half."""
    from scipy.stats import binom

    tie = float(binom.pmf(votes // 2, votes, share)) if votes % 2 == 0 else 0.0
    return float(binom.sf(votes // 2, votes, share)) + tie / 2


def draw_voting(path: Path, rows: Cells) -> None:
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.0, 2.6))
        for axes, kind in zip(figure.subplots(1, 2), ("voting", "any_correct"), strict=True):
            for colour, model in zip(COLOURS, ("sft", "rl"), strict=False):
                mine = [row for row in rows if row["model"] == model]
                ks = [row["k"] for row in mine]
                axes.plot(ks, [100 * row[kind] for row in mine], "o-", color=colour, markersize=3, label=model)
                axes.plot(ks, [100 * row[f"independent_{kind}"] for row in mine], ":", color=colour, linewidth=1.0,
                          label=f"{model}, if samples were independent")  # fmt: skip
            axes.plot(ks, [100 * row[f"coin_{kind}"] for row in mine], "--", color="#667085", label="a fair coin")
            axes.set_title(f"{kind.replace('_', '-')}@k, %", fontsize=8)
            axes.set_xlabel("samples k")
        axes.legend(fontsize=6, frameon=False)
        _save(figure, path)
