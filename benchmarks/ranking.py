"""Which pairs to compare: the share of held-out images whose right answer is ranked first, against judgements made.

Eight answers to a question about a held-out image, one of them right. All ordered pairs are judged once, greedily, and
recorded; every schedule is then played on the record, so that all see the same judgements and the table costs one pass.
Interrupted, it goes on where it stopped. Goal: the default schedule is within 2 points of all pairs in both orders, at
no more than half of its judgements, on at least 200 images.

    make demo
    python benchmarks/ranking.py [--model runs/demo/rl/hf] [--images 200] [--record FILE] [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from reporting import print_table, write_json
from tqdm import tqdm

from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.demo.digits import write_candidates
from megatron_r1reward.evaluation.statistics import estimate_share
from megatron_r1reward.files import recover_jsonl
from megatron_r1reward.judging.ask import AskOptions, Asks, Item, Judgement, Order
from megatron_r1reward.judging.compare import Votes
from megatron_r1reward.judging.rank import Schedule, rank
from megatron_r1reward.judging.reward_model import RewardModel

CANDIDATES = 8
GOAL_POINTS, GOAL_CALLS = 0.02, 0.5
REPEATS = 5  # seatings of the schedules that draw lots
# (name, schedule, rounds, both orders)
PLAYED: list[tuple[str, Schedule, int | None, bool]] = [
    ("all pairs, both orders", "all_pairs", None, True),
    ("all pairs, one order", "all_pairs", None, False),
    ("Swiss, 2 rounds, both orders", "swiss", 2, True),
    ("Swiss, 3 rounds, both orders (default)", "swiss", None, True),
    ("Swiss, 4 rounds, both orders", "swiss", 4, True),
    ("Swiss, 5 rounds, one order", "swiss", 5, False),
    ("knockout, both orders", "knockout", None, True),
    ("knockout, one order", "knockout", None, False),
    ("circular, both orders", "circular", None, True),
    ("circular, one order", "circular", None, False),
    ("pivot, both orders", "pivot", None, True),
]
DEFAULT = "Swiss, 3 rounds, both orders (default)"
Key = tuple[int, int, int]  # image, first shown, second shown


class Recorded:
    """Answers from the record of one image; counts what is asked."""

    def __init__(self, record: dict[Key, Judgement], image: int, responses: list[str]) -> None:
        self.record, self.image, self.responses = record, image, responses

    async def judge(
        self, item: Item, responses: tuple[str, str], *, order: Order, n: int, temperature: float, seed: int
    ) -> list[Judgement]:
        first, second = (self.responses.index(text) for text in responses)
        shown = (first, second) if order == "12" else (second, first)
        kept = self.record[(self.image, *shown)]
        if order == "12":
            return [kept]
        return [
            dataclasses.replace(
                kept,
                order="21",
                choice=None if kept.choice is None else 2 if kept.choice == 1 else 1,
                p_first=None if kept.p_first is None else 1 - kept.p_first,
            )
        ]


def read_record(path: Path, identity: str) -> dict[Key, Judgement]:
    record: dict[Key, Judgement] = {}
    for row in recover_jsonl(path):
        if row.pop("model") == identity:
            key = tuple(row.pop("key"))
            record[key] = Judgement(**row)
    return record


async def fill_record(
    client: Asks, rows: list[dict[str, Any]], folder: Path, record: dict[Key, Judgement], path: Path, model: str
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    todo = [
        (image, first, second)
        for image in range(len(rows))
        for first, second in permutations(range(CANDIDATES), 2)
        if (image, first, second) not in record
    ]
    with path.open("a") as sink, tqdm(total=len(todo), unit="judgement", mininterval=5) as bar:

        async def one(key: Key) -> None:
            row = rows[key[0]]
            item = Item.of(row["question"], [folder / image for image in row["images"]])
            pair = (row["responses"][key[1]], row["responses"][key[2]])
            (judgement,) = await client.judge(item, pair, order="12", n=1, temperature=0.0, seed=0)
            record[key] = judgement
            sink.write(json.dumps({"key": key, "model": model, **dataclasses.asdict(judgement)}) + "\n")
            bar.update()

        for start in range(0, len(todo), 512):
            async with asyncio.TaskGroup() as group:
                for key in todo[start : start + 512]:
                    group.create_task(one(key))
            sink.flush()


async def play(
    name: str, schedule: Schedule, rounds: int | None, both: bool, rows: list[dict[str, Any]], record: dict
) -> dict[str, Any]:
    hits, calls, confidence = np.zeros((len(rows), REPEATS)), [], []
    for image, row in enumerate(rows):
        model = Recorded(record, image, row["responses"])
        for repeat in range(REPEATS):
            found = await rank(
                model,
                Item(question=row["question"]),
                row["responses"],
                Votes(both_orders=both),
                schedule=schedule,
                rounds=rounds,
                seed=repeat * len(rows) + image,
            )
            best = [index for index, reward in enumerate(found.rewards) if reward >= found.rewards[found.best] - 1e-9]
            hits[image, repeat] = (row["right"] in best) / len(best)  # a shared first place is a draw by lot
            calls.append(found.calls)
            confidence.append(found.confidence)
    estimate = estimate_share(hits.mean(axis=1))
    return {
        "schedule": name,
        "judgements": float(np.mean(calls)),
        "right first": estimate.mean,
        "low": estimate.low,
        "high": estimate.high,
        "confidence": float(np.mean(confidence)),
    }


def blind_spot(rows: list[dict[str, Any]], record: dict[Key, Judgement]) -> list[dict[str, Any]]:
    """How often the two orders agree, and how often the first place wins, with and without the right answer."""
    kinds: dict[str, list[tuple[bool, bool]]] = {"right against wrong": [], "wrong against wrong": []}
    for (image, first, second), judgement in record.items():
        other = record.get((image, second, first))
        if first < second and other is not None and judgement.choice is not None and other.choice is not None:
            kind = "right against wrong" if rows[image]["right"] in (first, second) else "wrong against wrong"
            kinds[kind].append((judgement.choice != other.choice, judgement.choice == 1))
    return [
        {
            "pairs": kind,
            "count": len(found),
            "orders agree": float(np.mean([agree for agree, _ in found])),
            "first place wins": float(np.mean([first for _, first in found])),
        }
        for kind, found in kinds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/rl/hf"))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--record", type=Path, default=Path("runs/ranking/judgements.jsonl"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit code 1 when a goal is missed")
    options = parser.parse_args()
    identity = model_identity(options.model)
    record = read_record(options.record, identity)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_candidates(folder / "candidates.jsonl", rows=options.images, candidates=CANDIDATES)
        rows = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
        if len(record) < len(rows) * CANDIDATES * (CANDIDATES - 1):
            ask = AskOptions(max_tokens=64)
            with RewardModel.from_pretrained(options.model, max_model_len=1024, options=ask, report=print) as model:
                model.run(fill_record(model.model, rows, folder, record, options.record, identity))
        table = [asyncio.run(play(*played, rows, record)) for played in PLAYED]
    for row in table:
        row["share of calls"] = row["judgements"] / table[0]["judgements"]
    columns = ("schedule", "judgements", "share of calls", "right first", "low", "high", "confidence")
    print_table(columns, table)
    spots = blind_spot(rows, record)
    print()
    print_table(("pairs", "count", "orders agree", "first place wins"), spots)
    default = next(row for row in table if row["schedule"] == DEFAULT)
    behind = table[0]["right first"] - default["right first"]
    write_json(options.json, "ranking", table, images=len(rows), candidates=CANDIDATES, blind_spot=spots)
    print(
        f"default: {default['right first']:.1%} right first with {default['share of calls']:.0%} of the judgements "
        f"of all pairs in both orders, {100 * behind:+.1f} points behind"
    )
    if options.check and (behind > GOAL_POINTS or default["share of calls"] > GOAL_CALLS or len(rows) < 200):
        sys.exit(1)


if __name__ == "__main__":
    main()
