"""A benchmark's result to read: OUT/bench.md, and OUT/bench.svg with accuracy by category and by generated tokens.

Beside it stand the scores that others have published, in percent, each with its source. They are copied, not
reproduced: prompts, answer orders, decoding and the treatment of unreadable answers differ between them. `note` says
where a figure is not of the benchmark's own grouping. "-": not printed there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_r1reward.evaluation.bench import BenchResult
from megatron_r1reward.evaluation.bench_score import CategoryScore
from megatron_r1reward.evaluation.benchmark_rules import OfficialScore
from megatron_r1reward.evaluation.result import VoteBudget
from megatron_r1reward.evaluation.statistics import Estimate
from megatron_r1reward.files import atomic_path, write_text
from megatron_r1reward.report.charts import COLOURS, STYLE
from megatron_r1reward.report.vote_charts import judged_votes, plot_votes

_R1, _BASE = "arXiv 2505.02835", "arXiv 2509.16127"
_LEGACY = "legacy groups"


@dataclass(frozen=True, kw_only=True)
class Published:
    """`figures` are in the order of the benchmark's columns; None: not printed."""

    system: str
    figures: tuple[float | None, ...]
    source: str
    note: str = ""


def _row(system: str, source: str, *figures: float | None, note: str = "") -> Published:
    return Published(system=system, figures=figures, source=source, note=note)


COLUMNS: Mapping[str, tuple[str, ...]] = {
    "vl-rewardbench": ("general", "hallucination", "reasoning", "overall", "macro"),
    "multimodal-rewardbench": (
        "correctness", "preference", "knowledge", "math", "coding", "safety", "VQA", "mean of columns",
    ),
    "mm-rlhf-rewardbench": ("mcq", "long", "short", "safety", "video", "Acc", "Acc+"),
}  # fmt: skip

PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "vl-rewardbench": (
        _row("R1-Reward, greedy", _R1, 63.84, 85.71, 64.78, 71.92, 71.44, note=_LEGACY),
        _row("R1-Reward, voting@15", _R1, 66.32, 89.06, 73.70, 76.46, 76.36, note=_LEGACY),
        _row("MM-RLHF-Reward", _R1, 45.04, 50.45, 57.55, 50.15, 51.01, note=_LEGACY),
        _row("GPT-4o", _R1, 49.1, 67.6, 70.5, 65.8, 62.4),
        _row("Gemini-1.5-Pro", _R1, 50.8, 72.5, 64.2, 67.2, 62.5),
        _row("Claude-3.5-Sonnet", _R1, 43.4, 55.0, 62.3, 55.3, 53.6),
        _row("Claude-3.7-Sonnet", _R1, 68.08, 70.70, 60.81, 66.31, 66.53, note="groups unclear"),
        _row("Qwen2-VL-72B", _R1, 38.1, 32.8, 58.0, 39.5, 43.0),
        _row("IXC-2.5-Reward", _R1, 84.7, 62.5, 62.9, 65.8, 70.0),
        _row("BaseReward", _BASE, None, None, None, 82.16, 80.85),
        _row("Skywork-VL-Reward", "arXiv 2505.07263", None, None, None, 73.1, 69.0),
        _row("UnifiedReward-Think", "arXiv 2505.03318", None, None, None, 73.8, 72.3),
        _row("Proxy-GRM", "arXiv 2603.16600", None, None, None, 75.22, None),
        _row("MSRL", "arXiv 2603.25108", None, None, None, 75.9, None),
    ),
    "multimodal-rewardbench": (
        _row("R1-Reward, greedy", _R1, 77.5, 74.0, 74.9, 83.1, 79.6, 99.6, 86.5, 82.2),
        _row("R1-Reward, voting@15", _R1, 78.0, 77.2, 74.6, 81.3, 85.8, 99.4, 87.0, 83.3),
        _row("MM-RLHF-Reward", _R1, 61.7, 67.5, 54.3, 58.4, 57.9, 92.9, 76.8, 67.1),
        _row("GPT-4o", _R1, 62.6, 69.0, 72.0, 67.6, 62.1, 74.8, 87.2, 70.8),
        _row("Gemini-1.5-Pro", _R1, 63.5, 67.7, 66.3, 68.9, 55.5, 94.5, 87.2, 71.9),
        _row("Claude-3.7-Sonnet", _R1, 58.4, 60.7, 78.1, 76.3, 71.3, 72.0, 86.8, 71.9),
        _row("IXC-2.5-Reward", _R1, 60.7, 64.2, 56.8, 63.0, 50.5, 89.9, 81.1, 66.6),
        _row("BaseReward", _BASE, *[None] * 7, 72.8, note="over all rows"),
        _row("Proxy-GRM", "arXiv 2603.16600", *[None] * 7, 85.62),
        _row("MSRL", "arXiv 2603.25108", *[None] * 7, 80.5),
    ),
    "mm-rlhf-rewardbench": (
        _row("R1-Reward, greedy", _R1, 80.95, 89.19, 82.35, 75.00, 72.00, 80.59, 54.35),
        _row("R1-Reward, voting@15", _R1, 83.33, 97.30, 91.18, 78.12, 80.00, 86.47, 67.39),
        _row("Claude-3.7-Sonnet", _R1, 66.67, 91.89, 91.18, 87.50, 76.00, 82.35, 65.22),
        _row("GPT-4o", _R1, *[None] * 5, 58.23, 26.01),
        _row("IXC-2.5-Reward", _R1, *[None] * 5, 71.18, 50.00),
        _row("MM-RLHF-Reward", _R1, *[None] * 5, 82.00, 63.00),
        _row("Qwen2-VL-72B", _R1, *[None] * 5, 48.23, 13.04),
        _row("BaseReward", _BASE, *[None] * 5, 91.76, 80.43),
        _row("Proxy-GRM", "arXiv 2603.16600", *[None] * 5, 82.94, None),
    ),
}


def write_bench_report(result: BenchResult, out: Path) -> str:
    """Write bench.md and bench.svg into `out`; returns the text of the first."""
    text = "\n".join(_markdown(result)) + "\n"
    write_text(out / "bench.md", text)
    draw_bench(result, out / "bench.svg")
    return text


def _markdown(result: BenchResult) -> Iterator[str]:
    yield from (f"# {result.benchmark}", "")
    yield (
        f"{result.model}: {result.rows} rows, {result.unusable} unusable (quarantine.jsonl), {len(result.failed)} "
        f"requests failed, {result.official.without_verdict} rows without a verdict."
    )
    yield from _official("Benchmark's own rule", result.official)
    if result.kind != "generative":
        done = "read" if result.kind == "scalar" else "generated"
        yield from (
            "",
            f"A {result.kind} reward model: {result.calls} responses scored, {result.tokens} tokens {done}.",
        )
        yield from ("What it does not have:", "")
        yield from (f"- {name}: {reason}" for name, reason in result.absent.items())
    if result.legacy is not None:
        yield from _official("Legacy grouping of the released scripts", result.legacy)
    yield from ("", "## Both orders, 95 % intervals over items", "")
    groups = {"all": result.overall, **result.categories}
    yield from _table(("greedy", "pairs", "mean", "better first", "better second", "orders agree"), [
        [name, str(one.pairs), *map(_estimate, (one.greedy.mean, one.greedy.better_first, one.greedy.better_second,
                                                one.greedy.agreement))]
        for name, one in groups.items()
    ])  # fmt: skip
    if result.samples:
        yield from ("", f"## {result.samples} samples per order, mean of both orders", "")
        ks = list(result.overall.voting)
        most = ks[-1]
        header = ("sampled", *(f"voting@{k}" for k in ks), f"any-correct@{most}")
        yield from _table(header, [
            [name, *(_estimate(one.voting[k]) for k in ks), _estimate(one.any_correct[most])]
            for name, one in groups.items()
        ])  # fmt: skip
    if result.vote_budget is not None:
        yield from _vote_budget(result.vote_budget)
    yield from _published(result)


def _official(title: str, score: OfficialScore) -> Iterator[str]:
    yield from ("", f"## {title}", "")
    rows = []
    for name, group in (*score.groups.items(), ("overall (micro)", score.overall)):
        plus = "-" if group.accuracy_plus is None else _percent(group.accuracy_plus.accuracy)
        rows.append(
            [name, _percent(group.accuracy.accuracy), f"{group.accuracy.right} / {group.accuracy.counted}", plus]
        )
    yield from _table(
        ("group", "accuracy", "right / counted", "Acc+"), [*rows, ["macro", _percent(score.macro), "", ""]]
    )


def _vote_budget(budget: VoteBudget) -> Iterator[str]:
    yield from ("", "## Accuracy against generated tokens, per pair", "")
    yield from _table(("votes", "setting", "samples", "tokens", "accuracy"), [
        [point.method, point.setting, f"{point.samples:.1f}", f"{point.tokens:.0f}",
         f"{_percent(point.accuracy)} [{_percent(point.interval[0])}, {_percent(point.interval[1])}]"]
        for point in budget.points
    ])  # fmt: skip
    if (said := judged_votes(budget)) is not None:
        yield from ("", said)
    if budget.calibration_error is not None:
        yield from ("", f"Expected calibration error of adaptive votes: {budget.calibration_error:.3f}.")
    if budget.fits:
        yield from ("", "## Calibration: fitted on half of the items, measured on the others", "")
        yield from _table(("aggregator", "votes", "temperature", "items", "error before", "error after"), [
            [fit.aggregator, fit.votes, f"{fit.temperature:.3f}", f"{fit.items} / {fit.measured_items}",
             f"{fit.error_before:.3f}", f"{fit.error_after:.3f}"]
            for fit in budget.fits
        ])  # fmt: skip


def _published(result: BenchResult) -> Iterator[str]:
    """Theirs, and ours by the benchmark's own rule in the same columns."""
    if result.benchmark not in PUBLISHED:
        return
    columns = COLUMNS[result.benchmark]
    yield from ("", "## Published scores, as printed by their sources (prompts and orders differ)", "")
    rows = [[f"**{result.model}**", *_ours(result, columns), "this run", ""]]
    for one in PUBLISHED[result.benchmark]:
        assert len(one.figures) == len(columns), one.system
        figures = ["-" if figure is None else f"{figure:.2f}" for figure in one.figures]
        rows.append([one.system, *figures, one.source, one.note])
    yield from _table(("system", *columns, "source", "note"), rows)


def _ours(result: BenchResult, columns: Sequence[str]) -> list[str]:
    score = result.official
    found = {_column_of(name, columns): group.accuracy.accuracy for name, group in score.groups.items()}
    safety = [found[name] for name in ("safety/bias", "safety/toxicity") if name in found]
    if safety and len(safety) == 1:
        found["safety"] = safety[0]
    shares = [found.get(name) for name in columns[:7]]
    known = [share for share in shares if share is not None]
    plus = score.overall.accuracy_plus
    found |= {"overall": score.overall.accuracy.accuracy, "Acc": score.overall.accuracy.accuracy, "macro": score.macro}
    found |= {"Acc+": None if plus is None else plus.accuracy}
    found |= {"mean of columns": sum(known) / len(known) if len(known) == 7 else None}
    return [_percent(found.get(name)) for name in columns]


def _column_of(group: str, columns: Sequence[str]) -> str:
    """The published column of a group, e.g. "math" of "reasoning/math"; the group's own name where there is none."""
    last = group.rpartition("/")[2].removesuffix("_task").lower()
    return next((column for column in columns if column.lower() == last), group)


def draw_bench(result: BenchResult, path: Path) -> None:
    """Accuracy of both orders by category, greedy beside voting; with samples also accuracy against tokens."""
    groups = {"all": result.overall, **result.categories}
    panels = 1 if result.vote_budget is None else 2
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(4.2 * panels, 0.8 + 0.34 * max(len(groups), 5)))
        axes = figure.subplots(1, panels, squeeze=False)[0]
        _draw_categories(axes[0], groups)
        if result.vote_budget is not None:
            plot_votes(axes[1], result.vote_budget)
            _legend_above(axes[1])
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _draw_categories(axes: Axes, groups: Mapping[str, CategoryScore]) -> None:
    kinds = [("greedy", [one.greedy.mean for one in groups.values()])]
    if ks := list(next(iter(groups.values())).voting):
        kinds.append((f"voting@{ks[-1]}", [one.voting[ks[-1]] for one in groups.values()]))
    for number, ((label, estimates), colour) in enumerate(zip(kinds, COLOURS, strict=False)):
        places = [row + 0.22 * (number - (len(kinds) - 1) / 2) for row in range(len(groups))]
        means = [100 * one.mean for one in estimates]
        errors = [[100 * (one.mean - one.low) for one in estimates], [100 * (one.high - one.mean) for one in estimates]]
        axes.errorbar(means, places, xerr=errors, fmt="o", markersize=3.5, linewidth=1.2, color=colour, label=label)
    axes.axvline(50.0, color="#98a2b3", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(groups)), [f"{name} ({one.pairs})" for name, one in groups.items()])
    axes.invert_yaxis()
    axes.set_xlabel("right in both orders' mean, %; 95 % interval")
    _legend_above(axes)


def _legend_above(axes: Axes) -> None:
    """Where it hides no point."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, fontsize=7)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _estimate(one: Estimate | None) -> str:
    return "-" if one is None else f"{_percent(one.mean)} [{_percent(one.low)}, {_percent(one.high)}]"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
