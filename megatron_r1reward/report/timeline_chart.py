"""A picture of what ran when during a few steps of RL: servers, judge and trainer, one lane per phase."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

from megatron_r1reward.report.charts import COLOURS, STYLE

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
class TimelineDrawing:
    """`overlap`: share of the time of generation during which the trainer computed, over the whole run."""

    image: str  # SVG data URL
    first_step: int
    last_step: int
    overlap: float


def draw_timeline(rows: Sequence[Mapping[str, Any]]) -> TimelineDrawing | None:
    """Draw some steps from the middle of the run; None when there is no step with training and generation.

    Args:
        rows: of `monitor.timeline.Timeline`.
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
