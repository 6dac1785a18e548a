"""What stands on the report page, and which training curves, from which metrics; how it looks is in `templates/`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_r1reward.data.image_files import data_url
from megatron_r1reward.evaluation.result import EvaluationResult, Interval, Order, PairKind, Transcript, VoteBudget
from megatron_r1reward.monitor.metrics import METRICS
from megatron_r1reward.report.charts import Chart, Drawing, Scale, Series, draw, draw_timeline
from megatron_r1reward.report.inputs import RunFiles
from megatron_r1reward.report.vote_charts import draw_reliability, draw_votes, judged_votes
from megatron_r1reward.run_dir import duration

MAX_TRANSCRIPTS = 6


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
    CurveSpec(
        title="Critic",
        note="share of the variance of what came that it expected, before the update",
        metrics={"critic/explained_variance": "explained variance"},
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


@dataclass(frozen=True, kw_only=True)
class Card:
    title: str
    value: str
    note: str


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """A line of the main table: an accuracy with its interval, and any-correct where there are several samples."""

    model: str
    protocol: str
    accuracy: float
    interval: Interval
    any_correct: float | None = None
    control: bool = False


@dataclass(frozen=True, kw_only=True)
class DetailRow:
    """A property of both models, already formatted."""

    name: str
    sft: str
    rl: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a whole, e.g. a phase of the wall time."""

    name: str
    share: float
    text: str


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """The same pair in the same order, judged before and after RL."""

    before: Transcript
    after: Transcript
    images: tuple[str, ...]  # data URLs


def render_page(run: RunFiles, report: Mapping[str, Any]) -> str:
    """The whole page as HTML. Raises ValueError when a transcript's image cannot be read."""
    environment = Environment(
        loader=PackageLoader("megatron_r1reward.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "duration": duration}
    return environment.get_template("report.html.j2").render(
        run=run,
        report=report,
        cards=_cards(run),
        accuracy_rows=_accuracy_rows(run),
        detail_rows=_detail_rows(run),
        kind_rows=_kind_rows(run),
        categories=sorted(set(run.sft.by_category) | set(run.rl.by_category)),
        phases=_parts(run.timing.phases, duration),
        difficulty=_parts(run.difficulty, str),
        rl_charts=drawings(RL_CURVES, run.rl_rows),
        timeline=draw_timeline(run.timeline),
        sft_charts=drawings(SFT_CURVES, run.sft_rows),
        vote_charts=_vote_charts(run.rl.vote_budget),
        judged_votes=judged_votes(run.rl.vote_budget) if run.rl.vote_budget is not None else None,
        transcripts=_side_by_side(run),
    )


def _vote_charts(budget: VoteBudget | None) -> list[Drawing]:
    if budget is None:
        return []
    reliability = draw_reliability(budget.fits)
    return [draw_votes(budget), *([reliability] if reliability is not None else [])]


def _cards(run: RunFiles) -> list[Card]:
    rl, control = run.rl, run.rl.control
    most = max(rl.voting, key=int)
    cards = [
        Card(
            title="Held-out accuracy",
            value=_percent(rl.accuracy),
            note=f"{_points(rl.accuracy - run.sft.accuracy)} points over SFT",
        ),
        Card(
            title=f"Voting@{most}",
            value=_percent(rl.voting[most]),
            note=f"{_points(rl.voting[most] - rl.accuracy)} points over one sample",
        ),
        Card(
            title="Order consistency",
            value=_percent(rl.order_consistency),
            note=f"same response in both orders; SFT {_percent(run.sft.order_consistency)}",
        ),
        Card(
            title="Response length",
            value=f"{rl.mean_response_tokens:.1f}",
            note=f"tokens on average; SFT {run.sft.mean_response_tokens:.1f}",
        ),
        Card(title="Wall time", value=duration(run.timing.wall_seconds), note="the whole pipeline"),
    ]
    if run.best_of is not None:
        best = run.best_of
        note = f"right response picked; chance is {_percent(1 / best.candidates)}"
        cards.insert(3, Card(title=f"Best of {best.candidates}", value=_percent(best.right), note=note))
    if control is not None:
        note = "accuracy with another pair's images; chance is 50 %"
        cards.insert(3, Card(title="Shuffled images", value=_percent(control.accuracy), note=note))
    return cards


def _accuracy_rows(run: RunFiles) -> list[AccuracyRow]:
    rows = [*_rows_of("SFT", run.sft), *_rows_of("RL", run.rl)]
    if run.rl.control is not None:
        control = run.rl.control
        rows.append(
            AccuracyRow(
                model="RL, shuffled images",
                protocol="one sample",
                accuracy=control.accuracy,
                interval=control.interval,
                control=True,
            )
        )
    return rows


def _rows_of(model: str, found: EvaluationResult) -> Iterator[AccuracyRow]:
    if found.greedy is not None:
        greedy = found.greedy
        yield AccuracyRow(model=model, protocol="greedy", accuracy=greedy.accuracy, interval=greedy.interval)
    yield AccuracyRow(model=model, protocol="one sample", accuracy=found.accuracy, interval=found.interval)
    for k in sorted(found.voting, key=int):
        if k != "1":
            yield AccuracyRow(
                model=model,
                protocol=f"voting@{k}",
                accuracy=found.voting[k],
                interval=found.voting_intervals[k],
                any_correct=found.any_correct[k],
            )


def _detail_rows(run: RunFiles) -> list[DetailRow]:
    def with_interval(value: float, interval: Interval) -> str:
        return f"{_percent(value)} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"

    def row(name: str, show: Callable[[EvaluationResult], str]) -> DetailRow:
        return DetailRow(name=name, sft=show(run.sft), rl=show(run.rl))

    def accuracy_of(order: Order) -> Callable[[EvaluationResult], str]:
        return lambda e: with_interval(e.accuracy_by_order[order], e.accuracy_by_order_intervals[order])

    return [
        row("Accuracy, stored order", accuracy_of("12")),
        row("Accuracy, swapped order", accuracy_of("21")),
        row("Order consistency", lambda e: with_interval(e.order_consistency, e.order_consistency_interval)),
        row("Well-formed responses", lambda e: _percent(e.format_rate)),
        row("Answers that do not parse", lambda e: _percent(e.unparsable_rate)),
        row("of these refused / cut off", lambda e: f"{e.counts.quarantined} / {e.counts.truncated}"),
        row("Share of answers “1”", lambda e: "-" if e.answer_1_rate is None else _percent(e.answer_1_rate)),
        row("Response tokens", _tokens),
        row("Pairs / samples", lambda e: f"{e.counts.pairs} / {e.counts.samples}"),
    ]


def _kind_rows(run: RunFiles) -> list[DetailRow]:
    """By kind of pair: how often the first place wins, how often the orders agree."""
    found = [{kind.kind: kind for kind in result.pair_kinds} for result in (run.sft, run.rl)]

    def text(kind: PairKind | None) -> str:
        shares = (None, None) if kind is None else (kind.first_place, kind.order_agreement)
        return " / ".join("-" if share is None else _percent(share) for share in shares)

    return [DetailRow(name=name, sft=text(found[0].get(name)), rl=text(found[1].get(name))) for name in found[1]]


def _tokens(found: EvaluationResult) -> str:
    low, high = found.mean_response_tokens_interval
    return f"{found.mean_response_tokens:.1f} [{low:.1f}, {high:.1f}]"


def _parts(amounts: Mapping[str, float], text: Callable[[Any], str]) -> list[Part]:
    whole = sum(amounts.values()) or 1.0
    return [Part(name=name, share=amount / whole, text=text(amount)) for name, amount in amounts.items()]


def _side_by_side(run: RunFiles) -> list[SideBySide]:
    """Transcripts that both evaluations hold, in the order of the first."""
    after = {(entry.preference_id, entry.order): entry for entry in run.rl.transcripts}
    shared = [entry for entry in run.sft.transcripts if (entry.preference_id, entry.order) in after]
    return [
        SideBySide(before=entry, after=after[entry.preference_id, entry.order], images=_embedded(entry))
        for entry in shared[:MAX_TRANSCRIPTS]
    ]


def _embedded(entry: Transcript) -> tuple[str, ...]:
    try:
        return tuple(data_url(path) for path in entry.image_paths)
    except (OSError, ValueError) as error:
        raise ValueError(f"image of transcript {entry.preference_id!r} cannot be read, restore it: {error}") from error


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    return f"{100 * difference:+.1f}"
