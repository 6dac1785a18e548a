"""`r1reward bench [BENCHMARK] FILE --model FOLDER|URL`: a benchmark's own numbers, and ours in both orders.

OUT/judgements.jsonl   every judgement, as soon as it is there (`judgements`)
OUT/bench.json         the numbers; `report.bench_report` writes bench.md and bench.svg from them
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from megatron_r1reward.data.importing import schema_of
from megatron_r1reward.data.preference import read_preferences
from megatron_r1reward.data.rows import RawRow, iterate_rows
from megatron_r1reward.evaluation.bench_score import (
    CategoryScore,
    right_where_better_is,
    score_categories,
    vote_curves,
)
from megatron_r1reward.evaluation.benchmark_rules import (
    RULES,
    OfficialScore,
    Rule,
    group_name,
    id_of,
    official_score,
)
from megatron_r1reward.evaluation.judged_votes import JudgeAccess, open_vote_judge
from megatron_r1reward.evaluation.judgements import Asking, Judged, judge_pairs, judge_samples
from megatron_r1reward.evaluation.result import JudgedSamples, VoteBudget
from megatron_r1reward.evaluation.scalar_evaluation import ABSENT
from megatron_r1reward.files import remove_leftovers, write_text
from megatron_r1reward.judging.ask import ORDERS, AskOptions
from megatron_r1reward.judging.judge_prompt import JudgePrompt
from megatron_r1reward.judging.open_model import access_policy, open_model
from megatron_r1reward.judging.rewards import read_rewards
from megatron_r1reward.judging.served import kind_said
from megatron_r1reward.model_folder.prompt_policy import Kind
from megatron_r1reward.types import ModelAccess, Preference


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How a benchmark is judged.

    Args:
        image_root: of relative image paths; None: the file's folder.
        legacy: also the grouping of the released R1-Reward scripts.
        samples: per pair and order at `temperature`, beside the greedy judgement; 0: none.
        prompt, verdict: of another model, see `JudgePrompt.load`.
        request: fields of every request, JSON; null leaves one out.
        judge: of the samples' reasonings, for judge-filtered votes; None: no such votes.
    """

    image_root: Path | None = None
    legacy: bool = False
    samples: int = 0
    temperature: float = 1.0
    prompt: Path | None = None
    verdict: str = "answer"
    request: str = "{}"
    judge: JudgeAccess | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """`official` and `legacy` are the benchmark's own numbers, of greedy judgements; the others are of both orders.

    `absent`: what a scalar or pointwise reward model does not have, with the reason.
    """

    benchmark: str
    kind: Kind
    model: str
    rows: int
    unusable: int
    asked: int
    failed: Sequence[str]
    calls: int  # answered; of a model that reads one response two for a pair
    tokens: int  # generated; of a scalar reward model: read
    samples: int
    official: OfficialScore
    legacy: OfficialScore | None
    overall: CategoryScore
    categories: Mapping[str, CategoryScore]
    vote_budget: VoteBudget | None  # None: no samples
    absent: Mapping[str, str]

    def check_complete(self) -> None:
        """ValueError where a number rests on requests that were not answered."""
        if self.failed:
            raise ValueError(
                f"{len(self.failed)} of {self.asked} requests failed and count as no verdict, the first: "
                f"{self.failed[0]}. Run the same command again: it asks for these only"
            )


def run_bench(benchmark: str, source: Path, out: Path, access: ModelAccess, options: BenchOptions) -> BenchResult:
    """Serve or reach the model, judge every pair in both orders, write `out`/bench.json.

    Raises:
        ValueError: an option, the file or the model cannot be meant, or no pair could be judged.
    """
    rule = _rule(benchmark, options)
    if options.judge is not None:
        options.judge.check()  # before hours of asking
    kind = kind_said(access_policy(access))
    alone = kind != "generative"
    if alone:
        _check_alone(options, kind)
    prompt = JudgePrompt.load(options.prompt, verdict=options.verdict)
    request = _request_fields(options.request)
    out.mkdir(parents=True, exist_ok=True)
    for folder in (out, out / "media"):
        remove_leftovers(folder)
    raw = list(iterate_rows(source))
    rows = [dict(row.fields or {}) for row in raw]
    for row in rows:
        group_name(rule.group, row)  # raises where the file is of another benchmark, before hours of asking
    preferences = _read_pairs(raw, source, out, options.image_root)
    own = not prompt.turns and options.verdict == "answer"  # others may refuse to tell, and have no such token
    opened, name = open_model(access, AskOptions(prompt=prompt, log_probs=own, request_extra=request))
    other = [part for part in (prompt.turns, request) if part]
    asking = Asking(
        asked_as=(name, access.max_tokens, options.seed, *other),
        read=read_rewards if alone else prompt.read,
        orders=ORDERS[:1] if alone else ORDERS,
        samples=options.samples,
        temperature=options.temperature,
        seed=options.seed,
    )
    with opened:
        names = {place: id_of(rows[place]) for place in preferences}
        judged = judge_pairs(opened, preferences, out / "judgements.jsonl", asking, names)
    if not judged.greedy:
        raise ValueError(f"no pair of {source} could be judged: {list(judged.failed[:3])}")
    official, legacy = _official(rule, rows, judged, preferences, options)
    overall, categories = score_categories(rule, rows, judged, preferences, options.samples)
    result = BenchResult(
        benchmark=benchmark,
        kind=kind,
        model=access.model if access.model_name is None else access.model_name,
        rows=len(rows),
        unusable=len(rows) - len(preferences),
        asked=judged.asked,
        failed=judged.failed,
        calls=(judged.asked - len(judged.failed)) * (2 if alone else 1),
        tokens=judged.tokens,
        samples=options.samples,
        official=official,
        legacy=legacy,
        overall=overall,
        categories=categories,
        vote_budget=_curves(rows, judged, overall, out, access, options) if options.samples else None,
        absent=ABSENT.get(kind, {}),
    )
    write_text(out / "bench.json", json.dumps(_fields(result), indent=2, default=_plain) + "\n")
    return result


def _curves(
    rows: Sequence[Mapping[str, Any]],
    judged: Judged,
    overall: CategoryScore,
    out: Path,
    access: ModelAccess,
    options: BenchOptions,
) -> VoteBudget:
    """What the samples are worth as votes; with a judge, what it says about them is asked first."""
    supported: JudgedSamples | str = "no consistency judge was asked: --judge names one"
    if options.judge is not None:
        with open_vote_judge(options.judge, out, max_model_len=access.max_model_len) as judge:
            supported = judge_samples(judged, out / "judgements.jsonl", judge)
    return vote_curves(rows, judged, overall, options.samples, options.seed, supported)


def _check_alone(options: BenchOptions, kind: Kind) -> None:
    """Raises ValueError for what a model is not asked that reads one response at a time."""
    default, why = BenchOptions(), "gives a response one number and writes no text"
    names = ["samples", "prompt", "verdict", "judge", "request"]
    if kind == "pointwise":
        names, why = names[:-1], "rates each response, and is asked for no verdicts about pairs"
    for name in names:
        if getattr(options, name) != getattr(default, name):
            raise ValueError(f"--{name}: a {kind} reward model {why}: leave it out")


def _rule(benchmark: str, options: BenchOptions) -> Rule:
    if benchmark not in RULES:
        raise ValueError(f"benchmark {benchmark!r}: give one of {', '.join(RULES)}")
    rule = RULES[benchmark]
    if options.legacy and rule.legacy_group is None:
        raise ValueError(f"--legacy: {benchmark} has no legacy grouping; leave it out")
    if options.samples < 0 or (options.samples and options.temperature <= 0):
        raise ValueError(
            f"--samples {options.samples} at --temperature {options.temperature}: copies; raise it above 0"
        )
    if options.judge is not None and not options.samples:
        raise ValueError(f"--judge {options.judge.judge} is about samples: give --samples, e.g. 15")
    return rule


def _request_fields(text: str) -> dict[str, Any]:
    """`AskOptions.request_extra` for these fields of the request's body, whatever the client library knows of them."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--request {text!r} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f'--request {text!r}: give an object, e.g. {{"max_tokens": null}}')
    given = {name: value for name, value in fields.items() if value is not None}
    return dict.fromkeys(fields.keys() - given.keys()) | ({"extra_body": given} if given else {})


def _official(
    rule: Rule,
    rows: Sequence[Mapping[str, Any]],
    judged: Judged,
    preferences: Mapping[int, Preference],
    options: BenchOptions,
) -> tuple[OfficialScore, OfficialScore | None]:
    """By the benchmark's rule, and by the released scripts' where asked for: they show the better response first."""
    first, second = (right_where_better_is(judged, preferences, len(rows), second=flip) for flip in (False, True))
    lines = [judged.greedy.get((place, "12")) for place in range(len(rows))]
    stored = [None if line is None else line["right"] for line in lines]
    bits = np.random.default_rng(options.seed).integers(2, size=len(rows))
    drawn = [[one, other][bit] for one, other, bit in zip(first, second, bits, strict=True)]
    official = official_score(rule, rows, drawn if rule.drawn_order else stored)
    return official, official_score(rule, rows, first, legacy=True) if options.legacy else None


def _read_pairs(raw: Sequence[RawRow], source: Path, out: Path, image_root: Path | None) -> dict[int, Preference]:
    """The usable pairs by their place in the file; the others are in OUT/quarantine.jsonl."""
    schema = schema_of(raw, source)
    placed = (
        dataclasses.replace(row, fields=None if row.fields is None else {"row": row.fields, "place": place})
        for place, row in enumerate(raw)
    )
    result = read_preferences(
        source,
        image_root=image_root,
        media_dir=out / "media",
        quarantine=out / "quarantine.jsonl",
        convert=lambda row: {**schema.convert(row["row"]), "id": row["place"]},
        rows=placed,
    )
    return {int(preference.id): preference for preference in result.preferences}


def _fields(result: BenchResult) -> dict[str, Any]:
    return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}


def _plain(value: Any) -> Any:
    """Parts of the result that JSON does not know."""
    return value.model_dump() if isinstance(value, BaseModel) else dataclasses.asdict(value)
