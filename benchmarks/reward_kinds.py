"""Kinds of reward models on the same held-out data: how often each is right, and what that costs.

Every model judges the same held-out pairs (greedily; one that compares in both orders) and ranks the same eight answers
to questions about held-out images, one of them right. Calls are requests to a server, tokens are generated ones: a
scalar model generates none. Seconds are of asking, two servers being ready; they are written with --seconds only, which
is meant for a machine that does nothing else: the load of the last minute stands beside them. A pointwise model is
trained as docs/algorithm.md says.

    make demo && r1reward rm recipes/demo/rm.toml
    python benchmarks/reward_kinds.py [--model runs/demo/rl/hf --model runs/demo/rm/hf --model runs/pointwise/rl/hf]
                                      [--json FILE] [--seconds]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from reporting import print_table, write_json

from megatron_r1reward.data.identity import model_identity
from megatron_r1reward.data.preference import read_preferences
from megatron_r1reward.demo.digits import write_candidates
from megatron_r1reward.evaluation.judged_pair import JudgedPair
from megatron_r1reward.evaluation.statistics import Estimate, estimate_share
from megatron_r1reward.judging.ask import AskOptions
from megatron_r1reward.judging.compare import Comparison
from megatron_r1reward.judging.rank import Ranking
from megatron_r1reward.judging.reward_model import RewardModel
from megatron_r1reward.judging.rewards import kind_of
from megatron_r1reward.types import Preference

CANDIDATES = 8
_CONCURRENT = 32


def measure(folder: Path, pairs: Sequence[Preference], rows: Sequence[dict[str, Any]], root: Path) -> dict[str, Any]:
    """The row of one model."""
    options = AskOptions(max_tokens=64)
    with RewardModel.from_pretrained(folder, servers=2, max_model_len=1024, options=options, report=print) as model:
        kind = kind_of(model.model)
        compared, pair_seconds = model.run(_timed([_compare(model, pair) for pair in pairs]))
        ranked, best_seconds = model.run(_timed([_rank(model, row, root) for row in rows]))
    right = [_share(one, pair.label) for one, pair in zip(compared, pairs, strict=True)]
    items = [JudgedPair(preference=pair, samples={}, labels={}).item for pair in pairs]
    first = [row["right"] == one.best for one, row in zip(ranked, rows, strict=True)]
    return {
        "model": folder.parent.name,
        "kind": kind,
        "weights": model_identity(folder),
        **_interval("accuracy", estimate_share(right, items)),
        "calls per pair": float(np.mean([len(one.judgements) for one in compared])) if kind == "generative" else 2.0,
        "tokens per pair": float(np.mean([one.tokens for one in compared])),
        **_interval("best of 8", estimate_share(np.array(first, dtype=float))),
        "calls per image": float(np.mean([one.calls for one in ranked])),
        "tokens per image": 0.0 if kind == "scalar" else float(np.mean([one.tokens for one in ranked])),
        "seconds of pairs": pair_seconds,
        "seconds of images": best_seconds,
        "load": os.getloadavg()[0],
    }


async def _timed(work: Sequence[Any]) -> tuple[list[Any], float]:
    began, slots = time.monotonic(), asyncio.Semaphore(_CONCURRENT)

    async def one(task: Any) -> Any:
        async with slots:
            return await task

    return list(await asyncio.gather(*map(one, work))), time.monotonic() - began


async def _compare(model: RewardModel, pair: Preference) -> Comparison:
    return await model.acompare(pair.question, pair.responses, pair.image_paths)


async def _rank(model: RewardModel, row: dict[str, Any], root: Path) -> Ranking:
    return await model.arank(row["question"], row["responses"], [root / image for image in row["images"]])


def _share(found: Comparison, label: int | None) -> float:
    """A tie counts 1/2, and what cannot be read nothing."""
    if found.verdict is None:
        return 0.0 if found.probability is None else 0.5
    return float(found.verdict == label)


def _interval(name: str, found: Estimate) -> dict[str, float]:
    return {name: found.mean, f"{name} low": found.low, f"{name} high": found.high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", help="a folder; repeatable")
    parser.add_argument("--data", type=Path, default=Path("runs/demo/data/heldout.jsonl"))
    parser.add_argument("--pairs", type=int, default=420)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seconds", action="store_true", help="write the seconds: nothing else runs on this machine")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folders = options.model or [Path("runs/demo/rl/hf"), Path("runs/demo/rm/hf")]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        pairs = read_preferences(options.data, media_dir=root, quarantine=root / "q.jsonl").preferences[: options.pairs]
        write_candidates(root / "candidates.jsonl", rows=options.images, candidates=CANDIDATES)
        rows = [json.loads(line) for line in (root / "candidates.jsonl").read_text().splitlines()]
        table = [measure(folder, pairs, rows, root) for folder in folders]
    if not options.seconds:
        for row in table:
            del row["seconds of pairs"], row["seconds of images"], row["load"]
    print_table([name for name in table[0] if name != "weights"], table)
    write_json(options.json, "reward_kinds", table, pairs=len(pairs), images=len(rows), candidates=CANDIDATES)
    for row in table:
        print(
            f"{row['model']} ({row['kind']}): {row['accuracy']:.1%} of pairs right with {row['calls per pair']:.0f} "
            f"calls, best of {CANDIDATES} {row['best of 8']:.1%} with {row['calls per image']:.1f}"
        )


if __name__ == "__main__":
    main()
