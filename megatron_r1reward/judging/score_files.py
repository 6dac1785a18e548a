"""`r1reward score IN.jsonl OUT.jsonl`: rewards for files of pairs or candidates, resumable, every row accounted for.

    IN row   {"question": "...", "responses": ["...", "...", ...], "images": ["cat.png"], anything else}
    OUT row  {"key": content of the row and how it was asked, "row": its place in IN, "id": its id where it has one,
              "rewards": [...], "order": [...], "best": 0, "confidence": 0.97, "verdict": 1 (two responses),
              "probability": 0.93 (two responses), "comparisons": [...], "calls": 6}
             {"key": ..., "row": ..., "error": "why there is no reward"}

OUT grows by one line as each row is finished; a run that was killed goes on where it stopped, because a row is known
by its content, not by its place. Rows that ended with an error are tried again by the next run.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from megatron_r1reward.files import recover_jsonl, write_text
from megatron_r1reward.judging.compare import Votes
from megatron_r1reward.judging.open_model import open_model
from megatron_r1reward.judging.rank import SCHEDULES, Ranking, Schedule
from megatron_r1reward.judging.reward_model import RewardModel
from megatron_r1reward.types import ModelAccess

log = logging.getLogger(__name__)

_CONCURRENT_ROWS = 32


class ScoreRow(BaseModel):
    """One row of the input; other keys are kept for `--best-of`."""

    model_config = ConfigDict(extra="allow")

    question: str
    responses: list[str] = Field(min_length=1)  # a model that compares needs two
    images: list[str] = []
    id: str | int | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """How rows are judged; part of a row's identity."""

    votes: Votes
    schedule: Schedule = "swiss"
    rounds: int | None = None
    budget: int | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    rows: int
    reused: int  # answered by an earlier run
    failed: int
    calls: int
    unparsable: int


def run_score(
    source: Path,
    output: Path,
    model: ModelAccess,
    *,
    best_of: Path | None,
    image_root: Path | None,
    votes: int,
    both_orders: bool,
    schedule: str,
    rounds: int | None,
    budget: int | None,
    seed: int,
) -> None:
    """`r1reward score`: serve or reach the model, score the file, say what came of it.

    Raises:
        ValueError: an option or the model cannot be meant, or no row could be judged.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"--schedule {schedule!r}: give one of {', '.join(SCHEDULES)}")
    options = ScoreOptions(
        votes=Votes(samples=votes, both_orders=both_orders),
        schedule=cast(Schedule, schedule),
        rounds=rounds,
        budget=budget,
        seed=seed,
    )
    opened, name = open_model(model, votes=options.votes)
    with opened, tqdm(desc="score", unit="row", mininterval=1.0, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        summary = score_file(
            opened, source, output, options, model_name=name, image_root=image_root, best_of=best_of, progress=progress
        )
    log.info(
        "%s: %d rows, %d from an earlier run; %d judgements made, %d without a verdict; %d rows without a reward",
        *(output, summary.rows, summary.reused, summary.calls, summary.unparsable, summary.failed),
    )
    if summary.rows and summary.failed == summary.rows:
        raise ValueError(f"no row of {source} could be judged: see the `error` of each in {output}")


def score_file(
    model: RewardModel,
    source: Path,
    output: Path,
    options: ScoreOptions,
    *,
    model_name: str,
    image_root: Path | None = None,
    best_of: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ScoreSummary:
    """Score every row of `source` into `output`.

    Args:
        model_name: what the model is called in the rows' identity: another model's rewards are not taken for its own.
        image_root: relative image paths are below it; None: the folder of `source`.
        best_of: also write the winners there: the row with `response` in place of `responses`.
        progress: called with rows done and rows in all.

    Raises:
        ValueError: `source` cannot be read at all. A bad row is an `error` row of the output.
    """
    root = image_root or source.parent
    rows = list(_read_rows(source))
    keys = [_key(text, root, options, model_name) for text in rows]
    known = {row["key"]: row for row in recover_jsonl(output) if "key" in row and "error" not in row}
    todo = list({key: place for place, key in enumerate(keys) if key not in known}.values())  # equal rows once
    before = sum(key in known for key in keys)
    progress(before, len(rows))
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a", encoding="utf-8") as sink:

        def finished(result: dict[str, Any], done: int) -> None:
            sink.write(json.dumps(result, ensure_ascii=False) + "\n")
            sink.flush()
            progress(before + done, len(rows))

        fresh = asyncio.run(_score_rows(model, rows, keys, todo, root, options, finished))
    found = known | {row["key"]: row for row in fresh}
    results = [{**found[key], "row": place} for place, key in enumerate(keys)]
    # Once all is known: in the order of the input, one line a row.
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in results))
    if best_of is not None:
        write_text(best_of, "".join(_winners(rows, results)))
    return ScoreSummary(
        rows=len(rows),
        reused=before,
        failed=sum("error" in row for row in results),
        calls=sum(row.get("calls", 0) for row in fresh),
        unparsable=sum(row.get("unparsable", 0) for row in fresh),
    )


async def _score_rows(
    model: RewardModel,
    rows: Sequence[str],
    keys: Sequence[str],
    todo: Sequence[int],
    root: Path,
    options: ScoreOptions,
    finished: Callable[[dict[str, Any], int], None],
) -> list[dict[str, Any]]:
    slots = asyncio.Semaphore(_CONCURRENT_ROWS)
    results: list[dict[str, Any]] = []

    async def one(place: int) -> None:
        async with slots:
            result = {"key": keys[place], "row": place, **await _score_row(model, rows[place], root, options)}
        results.append(result)
        finished(result, len(results))

    async with asyncio.TaskGroup() as group:
        for place in todo:
            group.create_task(one(place))
    return results


async def _score_row(model: RewardModel, text: str, root: Path, options: ScoreOptions) -> dict[str, Any]:
    try:
        row = ScoreRow.model_validate_json(text)
        images = [image if image.startswith("data:") else str(root / image) for image in row.images]
        ranking = await model.arank(
            row.question,
            row.responses,
            images,
            votes=options.votes,
            schedule=options.schedule,
            rounds=options.rounds,
            budget=options.budget,
            seed=options.seed,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "row"
        return {"error": f"not a row {{question, responses, images}}: {where}: {first['msg']}"}
    except (ValueError, RuntimeError) as error:
        return {"error": str(error)}
    return {**({"id": row.id} if row.id is not None else {}), **ranking_json(ranking)}


def ranking_json(ranking: Ranking) -> dict[str, Any]:
    """A ranking as JSON; with two candidates also as a verdict."""
    comparisons = [
        {
            "first": i,
            "second": j,
            "probability": comparison.probability,
            "counts": dataclasses.asdict(comparison.counts),
            "orders_agree": comparison.orders_agree,
        }
        for (i, j), comparison in ranking.comparisons.items()
    ]
    tree: dict[str, Any] = {
        "kind": ranking.kind,
        "rewards": list(ranking.rewards),
        "order": list(ranking.order),
        "best": ranking.best,
        "confidence": ranking.confidence,
        "strengths": list(ranking.strengths),
        "standard_errors": list(ranking.standard_errors),
        "comparisons": comparisons,
        "calls": ranking.calls,
        "tokens": ranking.tokens,
        "ties": ranking.ties,
        "unparsable": ranking.unparsable,
        "cycles": ranking.cycles,
    }
    if len(ranking.rewards) == 2 and ranking.comparisons:
        ((pair, comparison),) = ranking.comparisons.items()
        assert pair == (0, 1)
        tree |= {"verdict": comparison.verdict, "probability": comparison.probability}
    return tree


def _read_rows(source: Path) -> Iterator[str]:
    try:
        with source.open(encoding="utf-8-sig", errors="replace") as lines:
            yield from (line.strip() for line in lines if line.strip())
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {error.strerror}") from error


def _key(text: str, root: Path, options: ScoreOptions, model_name: str) -> str:
    """Identity of a row: its content, its pictures' content, who is asked and how."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([text, model_name, dataclasses.asdict(options)], sort_keys=True).encode())
    try:
        images = ScoreRow.model_validate_json(text).images
    except ValidationError:
        images = []
    for path in (root / image for image in images if not image.startswith("data:")):
        digest.update(path.read_bytes() if path.is_file() else b"missing")
    return digest.hexdigest()


def _winners(rows: Sequence[str], results: Sequence[dict[str, Any]]) -> Iterator[str]:
    for text, result in zip(rows, results, strict=True):
        if "error" not in result:
            row = json.loads(text)
            responses = row.pop("responses")
            best = result["best"]
            winner = {**row, "response": responses[best], "best": best, "reward": result["rewards"][best]}
            yield json.dumps(winner, ensure_ascii=False) + "\n"
