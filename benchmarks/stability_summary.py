"""What the cells of `stability.py` come to: of one run's steps, and of one method's seeds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.training.alarms import Health

COIN = 0.58  # greedy accuracy that a coin stays below in 99 of 100 evaluations of 200 judgements


def summarise(rows: Sequence[Mapping[str, float | None]], config: RunConfig) -> dict[str, Any]:
    """What the steps of a run come to. A figure that was not finite is None in `rows`, and NaN here."""
    steps = [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]
    rollouts = config.rl.rollout_batch_size * config.algorithm.samples_per_prompt
    health = Health(config.health, config.algorithm, rollouts=rollouts, speaks=False)
    alarms = Counter(name for step in steps for name in health.look(step))

    def column(name: str) -> list[float]:
        return [step[name] for step in steps]

    def largest(name: str) -> float:
        return max((abs(value) for value in column(name) if math.isfinite(value)), default=math.nan)

    def last(name: str) -> float:
        return statistics.fmean(column(name)[-5:])

    return {
        "steps": len(steps),
        "loss_max": largest("loss"),
        "grad_norm_max": largest("grad_norm"),
        "grad_norm_last": last("grad_norm"),
        "filtered": statistics.fmean(column("advantage/filtered_fraction")),
        "negative_evidence_removed": sum(
            step["advantage/filtered_negative"] > 0 and step["advantage/negative_kept"] == 0 for step in steps
        ),
        "preclipped": statistics.fmean(column("ratio/preclipped_fraction")),
        "clipped": statistics.fmean(column("ratio/clipped_fraction")),
        "log_ratio_max": largest("ratio/max_abs_log"),
        "skipped_updates": int(sum(column("update/skipped"))),
        "not_finite": sum(not all(map(math.isfinite, (step["loss"], step["grad_norm"]))) for step in steps),
        "training_right_last": last("reward/result"),
        "entropy_last": last("entropy"),
        "staleness": statistics.fmean(column("staleness/mean")),
        "mismatch_max": largest("mismatch/max_abs"),
        "alarms": dict(alarms),
    }


def is_collapse(cell: Mapping[str, Any]) -> bool:
    """See the head of this file."""
    end = cell["end"]
    return bool(cell["ended"] or end is None or end["greedy"] < COIN or end["no_answer"] > 0.5)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval of those that are numbers; of fewer than two the width is unknown: NaN."""
    values = [value for value in values if math.isfinite(value)]  # a share of nothing is none
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2:
        return mean, math.nan, math.nan
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def table(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per stress and method, means over seeds."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["stress"], cell["method"]), []).append(cell)
    rows = []
    for (stress, method), members in groups.items():
        alive = [cell for cell in members if cell["end"] is not None]
        row: dict[str, Any] = {"stress": stress, "method": method, "seeds": [cell["seed"] for cell in members]}
        row["greedy_start"] = members[0]["start"]["greedy"]
        for name in ("greedy", "sampled", "orders_agree", "contradicts", "judged_inconsistent", "tokens", "no_answer"):
            row[name], *interval = mean_interval([cell["end"][name] for cell in alive]) if alive else [math.nan] * 3
            row[f"{name}_interval"] = interval
        for name in ("loss_max", "grad_norm_max", "log_ratio_max", "mismatch_max"):
            row[name] = max(cell[name] for cell in members)
        means = ("grad_norm_last", "filtered", "preclipped", "clipped", "training_right_last", "entropy_last",
                 "negative_evidence_removed", "staleness")  # fmt: skip
        row |= {name: statistics.fmean(cell[name] for cell in members) for name in means}
        row |= {name: sum(cell[name] for cell in members) for name in ("skipped_updates", "not_finite")}
        row["alarms"] = dict(sum((Counter(cell["alarms"]) for cell in members), Counter()))
        row["collapses"] = sum(map(is_collapse, members))
        rows.append(row)
    return rows


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table that is printed."""
    low, high = row["greedy_interval"]
    return {
        "stress": row["stress"], "method": row["method"],
        "greedy %": f"{100 * row['greedy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]", "sampled %": 100 * row["sampled"],
        "agree %": 100 * row["orders_agree"], "contradicts %": 100 * row["contradicts"],
        "loss max": row["loss_max"],
        "gradient max": row["grad_norm_max"], "last": row["grad_norm_last"], "filtered %": 100 * row["filtered"],
        "pre-clipped %": 100 * row["preclipped"], "clipped %": 100 * row["clipped"],
        "log ratio": row["log_ratio_max"], "alarms": " ".join(f"{k}:{v}" for k, v in row["alarms"].items()),
        "collapses": f"{row['collapses']} of {len(row['seeds'])}",
    }  # fmt: skip


def in_short(cell: Mapping[str, Any]) -> dict[str, Any]:
    """One run, beside the means over seeds."""
    end = cell["end"] or {}
    return {
        **{name: cell[name] for name in ("stress", "method", "seed", "steps", "ended", "loss_max", "grad_norm_max")},
        **{name: end.get(name) for name in ("greedy", "sampled", "orders_agree", "contradicts", "tokens")},
        "training_right": statistics.fmean(cell["curves"]["reward/result"]),
        "collapse": is_collapse(cell),
    }


def for_json(value: Any) -> Any:
    """The same with None where JSON has no number."""
    if isinstance(value, Mapping):
        return {key: for_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
