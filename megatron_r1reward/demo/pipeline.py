"""The whole pipeline on one machine without a GPU: the same commands a user would type, one after the other."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_r1reward.data.chat import parse_chat
from megatron_r1reward.data.prompt import JUDGE_TEMPLATE, POINTWISE_TEMPLATE, TEMPLATE, rating_text
from megatron_r1reward.data.rows import RowError
from megatron_r1reward.demo.digits import build_digits, write_candidates
from megatron_r1reward.evaluation.statistics import estimate_share
from megatron_r1reward.files import write_text
from megatron_r1reward.report.inputs import BEST_OF_FILE, BestOfFile

# The kind of question that a model of this size learns within minutes. The cold start is short: afterwards it knows the
# form, and is right in four cases of five, so that RL has something to gain.
CATEGORIES = ("digit",)
CLAIM = re.compile(r"\d+|\b(?:odd|even)\b")
FIXED_TEXTS = ["system\nYou are a helpful assistant.", "<think>", "</think><answer>", "</answer>"]
FIXED_TEXTS += [f" is in Response {label}" for label in (1, 2)] + [f"Response {label} is better." for label in (1, 2)]
MARKER = ".r1reward-demo"
CANDIDATES = 8  # of the best-of-N with the trained model


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of the pipeline; `minutes` is what it takes on two cores."""

    name: str
    title: str
    command: str
    run_file: str
    overrides: dict[str, str]
    minutes: float


def _stages(out: Path, seed: int) -> list[Stage]:
    data = out / "data"

    def stage(name: str, title: str, command: str, run_file: str, minutes: float, **overrides: object) -> Stage:
        paths = {key.replace("__", "."): str(value) for key, value in overrides.items()}
        return Stage(
            name=name,
            title=title,
            command=command,
            run_file=run_file,
            minutes=minutes,
            overrides={"run.output_dir": str(out / name), "run.seed": str(seed), **paths},
        )

    sft, rl, judge = (out / name / "hf" for name in ("sft", "rl", "judge"))
    return [
        stage("sft", "cold start of the reward model", "sft", "sft.toml", 0.8,
              model__path=out / "model", data__train=data / "sft.jsonl"),
        stage("judge", "training of the consistency judge", "sft", "judge.toml", 1,
              model__path=sft, data__train=data / "judge_sft.jsonl"),
        stage("annotate", "difficulty of each sample, by the cold-started model", "annotate", "eval.toml", 1,
              model__path=sft, data__train=data / "pool.jsonl"),
        stage("eval_sft", "evaluation before RL", "eval", "eval.toml", 2,
              model__path=sft, data__train=data / "pool.jsonl", evaluation__data=data / "heldout.jsonl"),
        stage("rl", "StableReinforce", "rl", "rl.toml", 4.5,
              model__path=sft, judge__model_path=judge, data__train=data / "pool.jsonl",
              evaluation__data=data / "heldout.jsonl"),
        stage("eval_rl", "evaluation after RL", "eval", "eval.toml", 2,
              model__path=rl, data__train=data / "pool.jsonl", evaluation__data=data / "heldout.jsonl",
              evaluation__shuffled_images_control="true"),
    ]  # fmt: skip


def _rows(files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from map(json.loads, file.read_text().splitlines())


def _fixed_phrases(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What stands between the claims in the texts of the data: a model that reads each such part as one token finds
    every claim next to what it means."""
    columns = ("question", "response_1", "response_2", "response", "candidate", "reasoning")
    texts = (row.get(column, "") for row in rows for column in columns)
    parts = {part.rstrip(" ") for text in texts for part in CLAIM.split(text)}
    return sorted(part for part in parts if len(part) > 1)


def write_demo_model(out: Path, corpus: Sequence[Path], *, seed: int) -> None:
    """A tiny Qwen2.5-VL whose tokenizer knows the fixed parts of all prompts and responses as single tokens."""
    from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint

    rows = list(_rows(corpus))
    rated = [row for row in rows if "rating" in row]  # of `data digits --pointwise`
    templates = (TEMPLATE, JUDGE_TEMPLATE, *((POINTWISE_TEMPLATE,) if rated else ()))
    phrases = [part for template in templates for part in re.split(r"\{\w+\}", template) if part]
    phrases += FIXED_TEXTS + _fixed_phrases(rows)
    others = [row for row in rows if "rating" not in row]
    try:
        texts = [parse_chat(row["message"]).user_text for row in others] + [row["response"] for row in others]
        for row in rated:
            texts.append(POINTWISE_TEMPLATE.format(question=row["question"], answer=row["candidate"]))
            texts.append(rating_text(row["reasoning"], row["rating"]))
    except (KeyError, RowError) as error:
        wanted = "give JSONL files of `r1reward data digits`, whose rows have message and response"
        raise ValueError(f"--corpus {', '.join(map(str, corpus))}: a row lacks {error}; {wanted}") from error
    write_tiny_checkpoint(out, corpus=texts, phrases=phrases, seed=seed)


def _clear(out: Path) -> None:
    """Make room for a new run; only a folder that an earlier demo made is ever removed.

    Raises:
        ValueError: `out` holds something else.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ValueError(f"{out} exists and is not an earlier demo: choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).touch()


def run_demo(
    out: Path,
    run_files: Path,
    *,
    seed: int = 0,
    sft_rows: int = 9_000,
    pool_rows: int = 2_400,
    judge_rows: int = 2_000,
    best_of_images: int = 40,
) -> None:
    """Data, model, SFT, judge, annotation, RL, evaluation, best-of-N, report; everything under `out`.

    Args:
        sft_rows: of the cold start; likewise for RL and the judge, see `build_digits`.
        best_of_images: held-out images of which the trained model picks the best answer.

    Raises:
        ValueError: `out` is not an earlier demo's, or a stage failed.
    """
    from megatron_r1reward.report.report import build_report

    console = Console()
    started = time.monotonic()
    phases: dict[str, float] = {}
    stages = _stages(out, seed)
    total = len(stages) + 3
    _clear(out)

    def announce(number: int, title: str, minutes: float) -> None:
        console.rule(f"[bold]\\[{number}/{total}] {title}[/bold] (about {minutes:g} min)", align="left")

    announce(1, "preference data from handwritten digits, and a tiny model", 0.5)
    build_digits(
        out / "data",
        seed=seed,
        sft_rows=sft_rows,
        pool_rows=pool_rows,
        judge_rows=judge_rows,
        categories=CATEGORIES,
    )
    write_demo_model(out / "model", [out / "data" / name for name in ("sft.jsonl", "judge_sft.jsonl")], seed=seed)
    phases["data"] = time.monotonic() - started
    for number, stage in enumerate(stages, start=2):
        announce(number, stage.title, stage.minutes)
        began = time.monotonic()
        _run(stage, run_files)
        phases[stage.name] = time.monotonic() - began
    announce(total - 1, f"the trained model in use: best of {CANDIDATES} on held-out images", 0.7)
    began = time.monotonic()
    _choose_best(out, images=best_of_images, seed=seed)
    phases["use"] = time.monotonic() - began
    announce(total, "report", 0.1)
    shutil.copyfile(out / "annotate" / "difficulty.json", out / "difficulty.json")
    wall_seconds = time.monotonic() - started
    write_text(out / "timing.json", json.dumps({"phases": phases, "wall_seconds": wall_seconds}, indent=2) + "\n")
    report = build_report(out)
    console.print(
        f"accuracy on held-out pairs: {_outcome(report)}; {wall_seconds / 60:.1f} min. Open {out / 'report.html'}",
        markup=False,
    )
    console.print(f"ask it yourself: r1reward serve {out / 'rl' / 'hf'}, then open http://127.0.0.1:8080", markup=False)


def _outcome(report: dict[str, Any]) -> str:
    kinds = {"one sample": [report[stage] for stage in ("sft", "rl")]}
    kinds["greedy"] = [
        stage["greedy"] for stage in kinds["one sample"] if stage["greedy"]
    ]  # a run file may turn it off
    return "; ".join(
        f"{kind} {found[0]['accuracy']:.1%} after SFT, {found[1]['accuracy']:.1%} after RL"
        for kind, found in kinds.items()
        if len(found) == 2
    )


def _choose_best(out: Path, *, images: int, seed: int) -> None:
    """The trained model in use, by the command of a user: `r1reward score --best-of` on images of the held-out split.

    Writes `use/candidates.jsonl`, `scores.jsonl`, `best.jsonl`, and what came of it to `BEST_OF_FILE`. An image that
    got no reward counts as not right.
    """
    candidates, scores = out / "use" / "candidates.jsonl", out / "use" / "scores.jsonl"
    write_candidates(candidates, rows=images, candidates=CANDIDATES, categories=CATEGORIES, seed=seed)
    options = {"model": out / "rl" / "hf", "best-of": out / "use" / "best.jsonl", "max-tokens": 96}
    options["max-model-len"] = 512
    _command("use", "score", candidates, scores, *(f"--{name}={value}" for name, value in options.items()))
    found = list(zip(_rows([candidates]), _rows([scores]), strict=True))
    right = estimate_share([float(score.get("best") == row["right"]) for row, score in found])
    result = BestOfFile(
        images=len(found),
        candidates=CANDIDATES,
        right=right.mean,
        right_interval=right.interval,
        judgements=sum(score.get("calls", 0) for _, score in found),
        failed=sum("error" in score for _, score in found),
    )
    write_text(out / BEST_OF_FILE, result.model_dump_json(indent=2) + "\n")


def _run(stage: Stage, run_files: Path) -> None:
    overrides = [f"{key}={value}" for key, value in stage.overrides.items()]
    _command(stage.name, stage.command, run_files / stage.run_file, *overrides)


def _command(stage: str, *command: object) -> None:
    code = subprocess.run([sys.executable, "-m", "megatron_r1reward.cli", *map(str, command)], check=False).returncode
    if code != 0:
        raise ValueError(f"stage {stage!r} ended with exit code {code}; its output above says why")
