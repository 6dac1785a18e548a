"""`r1reward data sft`: what `r1reward annotate` wrote, as supervised rows."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.difficulty import read_records
from megatron_r1reward.data.stage_data import read_training_preferences
from megatron_r1reward.evaluation.cold_start_set import ColdStartSet, ReasoningFilter, build_cold_start, card
from megatron_r1reward.files import write_jsonl, write_text
from megatron_r1reward.launch.stage_servers import open_judge
from megatron_r1reward.types import Label

log = logging.getLogger(__name__)


def write_cold_start(config: RunConfig, out: Path, *, keep: ReasoningFilter, judged: bool = False) -> ColdStartSet:
    """Write `sft.jsonl`, `README.md` and `sft.json` into `out`, from the run file that `annotate` ran with.

    Args:
        judged: ask the judge of [judge] whether each reasoning supports its answer.

    Raises:
        ValueError: `annotate` has not run, or no reasoning is left.
    """
    attempts = config.run.output_dir / "attempts.jsonl"
    if not attempts.is_file():
        raise ValueError(f"{attempts} does not exist: run `r1reward annotate` with the same run file first")
    preferences = read_training_preferences(config, "annotate").preferences
    records = read_records(attempts)
    if judged:
        with open_judge(config) as judge:
            if judge is None:
                raise ValueError("reward.use_judge is false: set it to true, or leave out --judge")

            def ask(cases: Sequence[tuple[str, Label]]) -> Sequence[str]:
                return asyncio.run(judge.judge_many(cases))

            built = build_cold_start(preferences, records, keep=keep, judge=ask)
    else:
        built = build_cold_start(preferences, records, keep=keep)
    built = replace(built, settings={"attempts": str(attempts), "judge": judged, **asdict(keep)})
    if not built.rows:
        raise ValueError(f"{attempts}: no reasoning is left: {dict(built.counts)}")
    write_jsonl(out / "sft.jsonl", built.rows)
    summary = {name: value for name, value in asdict(built).items() if name != "rows"}
    write_text(out / "sft.json", json.dumps(summary, indent=2) + "\n")
    write_text(out / "README.md", card(built))
    log.info("%s: %d rows; %s", out / "sft.jsonl", len(built.rows), dict(built.counts))
    return built
