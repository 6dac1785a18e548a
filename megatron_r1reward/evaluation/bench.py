"""`r1reward bench BENCHMARK FILE --model FOLDER|URL`: a benchmark's own numbers, and ours in both orders.

OUT/judgements.jsonl   every judgement, as soon as it is there: {"key", "row", "order", "sample", "text",
                       "choice", "right", "tokens", "finish_reason"}; `order` "21": the responses were exchanged
OUT/bench.json, bench.md   the numbers

A run that was killed goes on: `key` is the content of what was asked, of whom and how, and answers that are on record
are not asked for again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_r1reward.data.preference import read_preferences
from megatron_r1reward.data.rows import RawRow, iterate_rows
from megatron_r1reward.data.schemas import SCHEMAS, detect
from megatron_r1reward.evaluation.benchmark_rules import (
    RULES,
    BothOrdersScore,
    OfficialScore,
    both_orders_score,
    official_score,
)
from megatron_r1reward.files import write_jsonl, write_text
from megatron_r1reward.judging.ask import ORDERS, Item, Order
from megatron_r1reward.judging.compare import seed_of
from megatron_r1reward.judging.reward_model import RewardModel
from megatron_r1reward.judging.score_files import open_model
from megatron_r1reward.types import Preference

log = logging.getLogger(__name__)

_CONCURRENT_REQUESTS = 64
Judged = Mapping[tuple[int, Order], list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class _Request:
    key: str
    place: int
    order: Order
    preference: Preference  # its images are read when it is asked: all of a benchmark's do not fit in memory


def run_bench(
    benchmark: str,
    source: Path,
    out: Path,
    model: str,
    *,
    image_root: Path | None,
    legacy: bool,
    servers: int,
    max_tokens: int,
    max_model_len: int,
    api_key_variable: str,
    seed: int,
) -> None:
    """Serve or reach the model, judge every pair in both orders (greedy), write the numbers.

    Raises:
        ValueError: an option, the file or the model cannot be meant, or requests failed: the numbers are written, and
            the same command asks again for what is missing.
    """
    if benchmark not in RULES:
        raise ValueError(f"benchmark {benchmark!r}: give one of {', '.join(RULES)}")
    rule = RULES[benchmark]
    if legacy and rule.legacy_group is None:
        raise ValueError(f"--legacy: {benchmark} has no legacy grouping; leave it out")
    out.mkdir(parents=True, exist_ok=True)
    raw = list(iterate_rows(source))
    preferences = _read_pairs(raw, source, out, image_root)
    opened, name = open_model(
        model, servers=servers, max_tokens=max_tokens, max_model_len=max_model_len, api_key_variable=api_key_variable
    )
    with opened:
        judged, failed = _judge(opened, preferences, out / "judgements.jsonl", [name, max_tokens, seed], seed)
    if not judged:
        raise ValueError(f"no pair of {source} could be judged: {failed}")
    rows = [dict(row.fields or {}) for row in raw]
    first, second = ([_right(judged, preferences, place, flip) for place in range(len(rows))] for flip in (0, 1))
    stored = [_right_in(judged, place, "12") for place in range(len(rows))]
    drawn = [[one, other][bit] for one, other, bit in zip(first, second, _bits(seed, len(rows)), strict=True)]
    official = official_score(rule, rows, drawn if rule.drawn_order else stored)
    released = official_score(rule, rows, first, legacy=True) if legacy else None
    ours = both_orders_score(rows, first, second)
    account = {"rows": len(rows), "unusable": len(rows) - len(preferences), "failed": failed, "model": model}
    tree = {"benchmark": benchmark, **account, "official": official, "legacy": released, "both_orders": ours}
    write_text(out / "bench.json", json.dumps(tree, indent=2, default=dataclasses.asdict) + "\n")
    text = _markdown(benchmark, account, official, released, ours)
    write_text(out / "bench.md", text)
    print(text)
    _check_complete(failed, 2 * len(preferences))


def _check_complete(failed: Sequence[str], asked: int) -> None:
    """ValueError where a number rests on requests that were not answered."""
    if failed:
        raise ValueError(
            f"{len(failed)} of {asked} requests failed and count as no verdict, the first: {failed[0]}. "
            "Run the same command again: it asks for these only"
        )


def _read_pairs(raw: Sequence[RawRow], source: Path, out: Path, image_root: Path | None) -> dict[int, Preference]:
    """The usable pairs by their place in the file; the others are in OUT/quarantine.jsonl."""
    fields = next((row.fields for row in raw if row.fields is not None), None)
    if fields is None:
        raise ValueError(f"{source}: no readable row")
    columns = {name for name, value in fields.items() if value is not None}
    own = {"response_1", "response_2", "answer"} <= columns or {"message", "answer"} <= columns
    schema = SCHEMAS["r1_reward"] if own else detect(fields)
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


def _judge(
    model: RewardModel, preferences: Mapping[int, Preference], path: Path, asked_as: Sequence[object], seed: int
) -> tuple[Judged, list[str]]:
    """Judgements by place and order, recorded ones included, and why others are missing."""
    requests = []
    for place, preference in preferences.items():
        item = Item.of(preference.question, preference.image_paths)
        for order in ORDERS:
            said = json.dumps([place, item.key, *preference.responses, order, preference.label, *asked_as])
            key = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
            requests.append(_Request(key=key, place=place, order=order, preference=preference))
    known = _recorded(path)
    todo = [request for request in requests if request.key not in known]
    failed: list[str] = []
    with path.open("a", encoding="utf-8") as sink, tqdm(desc="bench", total=len(requests), disable=None) as bar:
        bar.update(len(requests) - len(todo))

        async def one(request: _Request, slots: asyncio.Semaphore) -> None:
            pair, order = request.preference.responses, request.order
            async with slots:
                try:
                    item = Item.of(request.preference.question, request.preference.image_paths)
                    (said,) = await model.model.judge(
                        item,
                        pair,
                        order=order,
                        n=1,
                        temperature=0.0,
                        seed=seed_of(seed, item, pair, order),
                    )
                except (ValueError, RuntimeError) as error:
                    failed.append(f"row {request.place}, order {order}: {error}")
                    return
            line = {
                "key": request.key,
                "row": request.place,
                "order": order,
                "sample": 0,
                "text": said.text,
                "choice": said.choice,
                "right": None if said.choice is None else said.choice == request.preference.label,
                "tokens": said.tokens,
                "finish_reason": said.finish_reason,
            }
            known[request.key] = line
            sink.write(json.dumps(line, ensure_ascii=False) + "\n")
            sink.flush()
            bar.update()

        async def everything() -> None:
            slots = asyncio.Semaphore(_CONCURRENT_REQUESTS)
            async with asyncio.TaskGroup() as group:
                for request in todo:
                    group.create_task(one(request, slots))

        model.run(everything())
    for problem in failed[:3]:
        log.warning("%s: not judged: %s", path, problem)
    return {
        (request.place, request.order): [known[request.key]] for request in requests if request.key in known
    }, failed


def _recorded(path: Path) -> dict[str, dict[str, Any]]:
    """The whole lines of an earlier run; what a kill left half written is cut off."""
    if not path.exists():
        return {}
    lines: dict[str, dict[str, Any]] = {}
    torn = False
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text) if text else None
        except json.JSONDecodeError:
            torn = True
            continue
        if line is not None:
            lines[line["key"]] = line
    if torn or (lines and not path.read_bytes().endswith(b"\n")):
        write_jsonl(path, lines.values())
    return lines


def _bits(seed: int, count: int) -> list[int]:
    return [int(bit) for bit in np.random.default_rng(seed).integers(2, size=count)]


def _right_in(judged: Judged, place: int, order: Order) -> bool | None:
    said = judged.get((place, order))
    return None if said is None else said[0]["right"]


def _right(judged: Judged, preferences: Mapping[int, Preference], place: int, flip: int) -> bool | None:
    """The verdict with the better response shown first; `flip` 1: second."""
    if place not in preferences:
        return None
    return _right_in(judged, place, ORDERS[(preferences[place].label == 2) ^ flip])


def _markdown(
    benchmark: str,
    account: Mapping[str, Any],
    official: OfficialScore,
    released: OfficialScore | None,
    ours: BothOrdersScore,
) -> str:
    lines = [f"# {benchmark}", "", f"{account['rows']} rows, {account['unusable']} unusable (quarantine.jsonl), "]
    lines[-1] += f"{len(account['failed'])} requests failed, {official.without_verdict} rows without a verdict."
    for title, score in (("Benchmark's own rule", official), ("Legacy grouping of the released scripts", released)):
        if score is None:
            continue
        lines += ["", f"## {title}", "", "| group | accuracy | right / counted | Acc+ |", "|---|---|---|---|"]
        for name, group in (*score.groups.items(), ("overall (micro)", score.overall)):
            plus = "-" if group.accuracy_plus is None else _percent(group.accuracy_plus.accuracy)
            tally = group.accuracy
            lines.append(f"| {name} | {_percent(tally.accuracy)} | {tally.right} / {tally.counted} | {plus} |")
        lines.append(f"| macro | {_percent(score.macro)} | | |")
    lines += ["", "## Both orders, 95 % intervals over items", "", "| figure | share | interval |", "|---|---|---|"]
    for name, figure in (
        ("better response first", ours.better_first),
        ("better response second", ours.better_second),
        ("mean", ours.mean),
        ("orders agree", ours.agreement),
    ):
        if figure is not None:
            lines.append(f"| {name} | {_percent(figure.mean)} | {_percent(figure.low)} to {_percent(figure.high)} |")
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
