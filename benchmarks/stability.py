"""Methods x stresses x seeds: what stays stable when a reward model is trained by RL, and what it takes.

    python benchmarks/stability.py runs/demo [--work runs/stability] [--stress late ...] [--method grpo ...]
        [--seeds 0 1 2] [--steps 10] [--json FILE] [--pictures FOLDER]

The data, the cold start, the judge and the trained model are those of a finished `make demo`. A cell is a run of the
real trainer (`training.rl.run`) by the demo's run file with the overrides of its method and its stress; responses are
drawn by `local_policy` in this process. A cell that is in `--work` with the same overrides is not run again, so an
interrupted matrix goes on where it was; stress by stress, seed by seed, so that all methods have come equally far.

Held-out accuracy is real decoding, greedy and one sample, of `PAIRS` pairs in both orders. Intervals are Student's over
seeds (95 %). A collapse: greedy accuracy ends where a coin's could be (`COIN`), or half of the responses hold no
answer, or the run could not go on. Alarms are those of `training.alarms`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import megatron_r1reward.parallel  # noqa: F401  (before megatron-core)

torch.set_num_threads(1)

from local_policy import LocalJudge, LocalPool, LocalScorer  # noqa: E402
from reporting import print_table, write_json  # noqa: E402
from stability_pictures import draw_pictures, draw_voting, voting_rows  # noqa: E402
from stability_summary import for_json, in_short, is_collapse, shown, summarise, table  # noqa: E402

from megatron_r1reward.config.load import load_config  # noqa: E402
from megatron_r1reward.config.schema import RunConfig, SamplingSection  # noqa: E402
from megatron_r1reward.data.loader import seeded_sample  # noqa: E402
from megatron_r1reward.data.pixels import ImageProcessor  # noqa: E402
from megatron_r1reward.data.preference import read_preferences  # noqa: E402
from megatron_r1reward.data.prompt import PromptBuilder  # noqa: E402
from megatron_r1reward.model_folder.examine import load_tokenizer  # noqa: E402
from megatron_r1reward.parallel import setup  # noqa: E402
from megatron_r1reward.parallel.setup import Topology  # noqa: E402
from megatron_r1reward.training import rl  # noqa: E402
from megatron_r1reward.types import Preference, Prompt, ScoredRollout  # noqa: E402

RUN_FILE = Path(__file__).parents[1] / "recipes" / "demo" / "rl.toml"
PAIRS = 100  # held-out, for every accuracy
ROLLOUTS, PER_UPDATE = 64, 32  # of a step, of an optimizer step
ROWS = 600  # of the demo's pool
LATE_ROUNDS, LATE_SAMPLES = 2, 8  # attempts of the trained model at each; "late" has what it got right every time
LAG = 4  # steps between the weights that sample and those that are trained, where that is the stress
SAMPLES = 4  # per prompt, of methods with groups
CURVES = (
    "loss", "grad_norm", "reward/result", "entropy", "ratio/max_abs_log", "advantage/filtered_fraction",
    "advantage/negative_kept", "advantage/balance", "response/mean_tokens",
)  # fmt: skip
# The form of the demo's responses (`demo.digits_text.reasoning`).
_FORM = re.compile(
    r"<think>The answer (\w+) is in Response 1, the answer (\w+) is in Response 2\.\nI see (\w+)\.\n"
    r"The answer (\w+) is in Response ([12])\.</think><answer>([12])</answer>"
)

_GROUP = ("algorithm.samples_per_prompt=4", f"rl.rollout_batch_size={ROLLOUTS // SAMPLES}",
          f"rl.train_batch_size={PER_UPDATE // SAMPLES}")  # fmt: skip
METHODS: Mapping[str, tuple[str, ...]] = {
    "stable_reinforce": (),
    "without_preclip": ("algorithm.method=stable_reinforce_without_preclip",),
    "without_filter": ("algorithm.method=stable_reinforce_without_filter",),
    "without_consistency": ("algorithm.method=stable_reinforce_without_consistency",),
    "reinforce_plus_plus": ("algorithm.method=reinforce_plus_plus",),
    "grpo": ("algorithm.method=grpo", *_GROUP),
    "gspo": ("algorithm.method=gspo", *_GROUP),
    "cispo": ("algorithm.method=cispo", *_GROUP),
    "sapo": ("algorithm.method=sapo", *_GROUP),
    "ppo": ("algorithm.method=ppo",),
    # Ways out where the filter starves learning.
    "filter_released": ("algorithm.filter=released_code",),
    "filter_clamp": ("algorithm.filter=clamp",),
    "dynamic_sampling": (*_GROUP, "rl.dynamic_sampling_rounds=3"),
    "harder_rows": (),  # the whole pool in place of the easy rows
}
STRESSES: Mapping[str, tuple[str, ...]] = {
    "late": ("optimizer.lr=1e-4",),  # from the trained model, on rows that it is right about, at a third of the rate
    "rate": ("optimizer.lr=3e-3", "optimizer.clip_grad=1e9"),  # ten times the demo's, gradients as they come
    "late_rate": ("optimizer.lr=3e-3", "optimizer.clip_grad=1e9"),  # both: a trained model is ruined
    "none": (),
    "epochs": ("rl.epochs_per_batch=4",),
    "stale": (f"asynchrony.max_staleness={LAG}",),
}
HALF = ("rate", "epochs")  # with half of the steps
LATE = ("late", "late_rate")  # from the trained model
# By default. A part of the method is left out where it acts: elsewhere the run without it is the same run.
CELLS: Mapping[str, tuple[str, ...]] = {
    "late": ("stable_reinforce", "without_filter", "filter_clamp", "dynamic_sampling", "harder_rows"),
    "rate": ("stable_reinforce", "without_preclip", "reinforce_plus_plus", "ppo", "grpo", "gspo", "cispo", "sapo"),
    "late_rate": ("stable_reinforce", "reinforce_plus_plus", "ppo", "grpo"),
    "none": ("stable_reinforce", "without_consistency", "reinforce_plus_plus", "ppo", "grpo", "gspo", "cispo", "sapo"),
    "epochs": ("stable_reinforce", "reinforce_plus_plus"),
    "stale": ("stable_reinforce", "reinforce_plus_plus"),
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    stress: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.stress}-{self.method}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the cells share."""

    demo: Path
    work: Path
    steps: int
    pairs: int
    run_file: Path = RUN_FILE
    rows: int = ROWS
    extra: tuple[str, ...] = ()  # overrides of every cell

    def overrides(self, cell: Cell) -> list[str]:
        """Of the run file; all but where the cell writes."""
        late = cell.stress in LATE
        easy = late and cell.method != "harder_rows"
        data = self.demo / "data"
        steps = self.steps // 2 if cell.stress in HALF else self.steps
        return [
            f"run.seed={cell.seed}", "run.local_ranks=1", "run.num_threads=1",
            f"model.path={self.demo / ('rl' if late else 'sft') / 'hf'}",
            f"judge.model_path={self.demo / 'judge' / 'hf'}",
            f"data.train={self.work / ('late.jsonl' if easy else 'pool.jsonl')}", f"data.image_root={data}",
            f"evaluation.data={data / 'heldout.jsonl'}", f"evaluation.max_pairs={self.pairs}", f"rl.steps={steps}",
            f"rl.rollout_batch_size={ROLLOUTS}", f"rl.train_batch_size={PER_UPDATE}",
            f"checkpoint.save_every={steps}", "monitor.tensorboard=false", f"monitor.console_every={steps}",
            *STRESSES[cell.stress], *METHODS[cell.method], *self.extra,
        ]  # fmt: skip

    def config(self, cell: Cell) -> RunConfig:
        folder = self.work / "runs" / cell.name
        return load_config(self.run_file, [*self.overrides(cell), f"run.output_dir={folder}"])


def matrix(stresses: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """In the order in which they run: an interrupted matrix has all methods and seeds of the stresses before."""
    return [
        Cell(stress=stress, method=method, seed=seed)
        for stress in stresses
        for seed in seeds
        for method in methods or CELLS[stress]
    ]


def run_matrix(bench: Bench, cells: Sequence[Cell], topology: Topology) -> list[dict[str, Any]]:
    """The results of all cells; those that are there are read."""
    found = []
    began: dict[Path, dict[str, float]] = {}  # accuracy before RL, by model
    for number, cell in enumerate(cells, 1):
        path = bench.work / "cells" / f"{cell.name}.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        if kept.get("overrides") != bench.overrides(cell):
            started = time.process_time()
            kept = run_cell(bench, cell, topology, began)
            kept["seconds"] = time.process_time() - started
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(kept) + "\n")
            temporary.replace(path)
            end = f"{100 * kept['end']['greedy']:.1f} %" if kept["end"] else kept["ended"]
            print(f"{number}/{len(cells)} {cell.name}: greedy {100 * kept['start']['greedy']:.1f} % -> {end}, "
                  f"{kept['seconds']:.0f} s of processor time", flush=True)  # fmt: skip
        found.append(kept)
    return found


def run_cell(bench: Bench, cell: Cell, topology: Topology, began: dict[Path, dict[str, float]]) -> dict[str, Any]:
    """Train, and judge the held-out pairs before and after."""
    write_pools(bench, cell)
    config = bench.config(cell)
    shutil.rmtree(config.run.output_dir, ignore_errors=True)
    judge = LocalJudge(Path(config.judge.model_path or ""), reasoning_lines=config.judge.reasoning_lines)
    pool = LocalPool(config.model.path, images(config), lag=LAG if cell.stress == "stale" else 0)
    if config.model.path not in began:
        began[config.model.path] = evaluate(pool, judge, config)
    ended, end = "", None
    with contextlib.closing(LocalScorer(config.reward, judge)) as scorer:
        try:
            rl.run(config, topology, rl.Services(pool=pool, scorer=scorer))  # type: ignore[arg-type]
        except (ValueError, RuntimeError) as error:  # e.g. no update was finite, or nothing can be drawn from NaN
            ended = str(error).splitlines()[0][:200]
    with contextlib.suppress(RuntimeError):  # weights that nothing can be drawn from
        pool.use_newest()
        end = evaluate(pool, judge, config)
    rows = [json.loads(line) for line in (config.run.output_dir / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(config.run.output_dir)
    return {
        "stress": cell.stress, "method": cell.method, "seed": cell.seed, "overrides": bench.overrides(cell),
        "start": began[config.model.path], "end": end, "ended": ended, **summarise(rows, config),
        "curves": {name: [row[name] for row in rows] for name in CURVES},
    }  # fmt: skip


def evaluate(pool: LocalPool, judge: LocalJudge, config: RunConfig) -> dict[str, float]:
    """Held-out pairs in both orders, greedily and by one sample; what the reasoning of the samples is worth."""
    assert config.evaluation.data is not None
    read = read_preferences(config.evaluation.data, image_root=config.data.image_root, verify_images=False)
    prompts = both_orders(seeded_sample(read.preferences, config.evaluation.max_pairs, seed=0), config)
    scored = {}
    with contextlib.closing(LocalScorer(config.reward.model_copy(update={"use_judge": True}), judge)) as scorer:
        for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            sampling = SamplingSection(temperature=temperature, max_tokens=config.sampling.max_tokens)
            scored[kind] = scorer.score(pool.submit(prompts, sampling, seed=0).result().rollouts)[0]
    greedy, sampled = scored["greedy"], scored["sampled"]
    right = [item for item in sampled if item.result_reward]
    form = [found for item in sampled if (found := _FORM.fullmatch(item.rollout.text.strip())) is not None]
    return {
        "greedy": share(item.result_reward == 1 for item in greedy),
        "sampled": share(item.result_reward == 1 for item in sampled),
        "orders_agree": share(agree(first, second) for first, second in zip(greedy[::2], greedy[1::2], strict=True)),
        "no_answer": share(item.predicted is None for item in sampled),
        "answer_1": share(item.predicted == 1 for item in sampled),
        "tokens": statistics.fmean(len(item.rollout.token_ids) for item in sampled),
        # Verdicts that their reasoning does not support: by the judge, of right answers; and by rule, of all answers
        # of the demo's form, right or wrong.
        "judged_inconsistent": share(item.verdict == "inconsistent" for item in right),
        "contradicts": share(not supported(*found.groups()) for found in form),
        "other_form": 1 - len(form) / len(sampled),
    }  # fmt: skip


def agree(first: ScoredRollout, second: ScoredRollout) -> bool:
    """Two answers, in the two orders of a pair, that name the same response."""
    return {first.predicted, second.predicted} == {1, 2}


def supported(first: str, second: str, seen: str, named: str, response: str, answer: str) -> bool:
    """What is seen is what the reasoning ends with, the response named for it says so, and it is the answer."""
    return seen == named == (first if response == "1" else second) and response == answer


def share(flags: Iterator[bool]) -> float:
    """NaN of none."""
    values = list(flags)
    return sum(values) / len(values) if values else math.nan


def both_orders(preferences: Sequence[Preference], config: RunConfig) -> list[Prompt]:
    builder = PromptBuilder(load_tokenizer(config.model.path), config.data.max_prompt_tokens)
    return [builder.build(row, swapped=swapped) for row in preferences for swapped in (False, True)]


def images(config: RunConfig) -> ImageProcessor:
    """One for all cells: the same images come again and again."""
    return _images(config.model.path, config.data.min_pixels, config.data.max_pixels)


@cache
def _images(folder: Path, min_pixels: int, max_pixels: int) -> ImageProcessor:
    return ImageProcessor(folder, min_pixels=min_pixels, max_pixels=max_pixels)


def write_pools(bench: Bench, cell: Cell) -> None:
    """Some of the demo's rows, `pool.jsonl`; and of these those that the trained model is right about in each of
    `LATE_ROUNDS * LATE_SAMPLES` attempts, half of them in each order, `late.jsonl`."""
    pool, late = bench.work / "pool.jsonl", bench.work / "late.jsonl"
    bench.work.mkdir(parents=True, exist_ok=True)
    lines = (bench.demo / "data" / "pool.jsonl").read_text().splitlines()[: bench.rows]
    pool.write_text("\n".join(lines) + "\n")
    if cell.stress not in LATE or late.exists():
        return
    config = bench.config(cell)
    rows = read_preferences(pool, image_root=config.data.image_root).preferences
    model = LocalPool(config.model.path, images(config))
    with contextlib.closing(LocalScorer(config.reward.model_copy(update={"use_judge": False}), None)) as scorer:
        for turn in range(LATE_ROUNDS):
            prompts = both_orders(rows, config)
            drawn = model.submit(prompts, config.sampling, n=LATE_SAMPLES // 2, seed=1_000_003 + turn).result().rollouts
            wrong = {one.rollout.prompt.preference_id for one in scorer.score(drawn)[0] if not one.result_reward}
            rows = [row for row in rows if row.id not in wrong]
            attempts = (turn + 1) * LATE_SAMPLES
            print(f"late: right in each of {attempts} attempts: {len(rows)} of {len(lines)} rows", flush=True)
            if not rows:
                raise ValueError(f"{config.model.path} is right {attempts} times about no row: train it longer")
    kept = {row.id for row in rows}
    late.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["id"] in kept))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, nargs="?", default=Path("runs/demo"), help="a finished `make demo`")
    parser.add_argument("--work", type=Path, default=Path("runs/stability"), help="where cells are kept")
    parser.add_argument("--stress", nargs="+", choices=STRESSES, default=list(STRESSES))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=[], help="default: CELLS")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder")
    options = parser.parse_args()
    if not (options.demo / "rl" / "hf").is_dir():
        parser.error(f"{options.demo} is no finished demo (rl/hf is missing): run make demo, or name its folder")
    logging.basicConfig(level=logging.ERROR)
    bench = Bench(demo=options.demo.resolve(), work=options.work.resolve(), steps=options.steps, pairs=options.pairs)
    cells = matrix(options.stress, options.method, options.seeds)
    topology = setup.initialize(bench.config(cells[0]).parallel, seed=0)
    results = run_matrix(bench, cells, topology)
    rows = table(results)
    printed = list(map(shown, rows))
    print_table(list(printed[0]), printed)
    votes = voting_rows(bench.demo)
    write_json(
        options.json, "stability", for_json(rows), cells=for_json(list(map(in_short, results))), voting=votes,
        steps=options.steps, rollouts=ROLLOUTS, rollouts_per_update=PER_UPDATE, pairs=options.pairs, methods=METHODS,
        stresses=STRESSES, start={cell["stress"]: cell["start"] for cell in results},
        decoding="transformers' generate on the trainer's weights; greedy, and one sample at temperature 1",
    )  # fmt: skip
    if options.pictures is not None:
        draw_pictures(options.pictures, results, rows)
        draw_voting(options.pictures / "stability_voting.svg", votes)
    collapsed = sum(map(is_collapse, results))
    minutes = sum(cell["seconds"] for cell in results) / 60
    print(f"{len(results)} cells in {minutes:.0f} minutes of processor time, {collapsed} collapsed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
