"""What overlapping generation and training gains: synchronous against one-step-off, in one run on one machine.

The demo's model, data and judge. Servers (rollout and judge) are pinned to the first core, the trainer, one rank with
one thread, to the second; both modes use the same servers, in turns, from the same weights, so that a busy moment of
the machine meets both. Steps per second come from the times in metrics.jsonl, without the first steps of each turn.
After the last turn of a mode the weights that the servers hold are asked about held-out pairs in both orders. Goals: at
least 1.3 times the steps per second of synchronous, with a held-out accuracy inside the interval of synchronous.

    make demo
    python benchmarks/asynchrony.py [--demo runs/demo] [--steps 40] [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reporting import print_table, write_json
from transformers import AutoTokenizer

from megatron_r1reward.config.load import dump_config, load_config
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.preference import read_preferences
from megatron_r1reward.data.prompt import PromptBuilder
from megatron_r1reward.evaluation.evaluate import evaluate
from megatron_r1reward.evaluation.result import EvaluationResult
from megatron_r1reward.launch.stage_servers import open_evaluation_pool
from megatron_r1reward.servers.build import judge_server, rollout_server
from megatron_r1reward.servers.process import VllmServer, start_servers

RUN_FILE = Path(__file__).parents[1] / "recipes" / "demo" / "rl.toml"
MODES = ("synchronous", "one_step_off")
WARM_UP = 2  # steps that are not timed
GOAL_RATIO = 1.3
COLUMNS = ("mode", "steps/s", "step", "wait", "generate", "score", "log_probs", "update", "push",
           "accuracy", "low", "high")  # fmt: skip


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """Processes started inside run on this core alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def configuration(demo: Path, scratch: Path, options: argparse.Namespace) -> RunConfig:
    overrides: dict[str, object] = {
        "run.output_dir": scratch,
        "run.local_ranks": 1,
        "model.path": demo / "sft" / "hf",
        "judge.model_path": demo / "judge" / "hf",
        "data.train": demo / "data" / "pool.jsonl",
        "data.select": demo / "annotate" / "hard.json",
        "evaluation.data": demo / "data" / "heldout.jsonl",
        "rl.steps": options.steps,
        "rl.rollout_batch_size": options.batch,
        "rl.train_batch_size": options.batch // 2,
        "rl.heldout_every": options.steps + 1,  # never: measured at the end
        "algorithm.truncated_importance_sampling": 2.0,
        "rollout.count": 1,
        "checkpoint.save_every": options.steps,
    }
    return load_config(RUN_FILE, [f"{key}={value}" for key, value in overrides.items()])


def servers_of(config: RunConfig, logs: Path, media: Path) -> list[VllmServer]:
    """One rollout server and one judge; clients get one token for both from the environment."""
    pixels = (config.data.min_pixels, config.data.max_pixels)
    rollout = rollout_server(
        config.rollout, 0, model_path=config.model.path, log_path=logs / "rollout-0.log", takes_weights=True,
        media_root=media, pixels=pixels,
    )  # fmt: skip
    return [rollout, judge_server(config.judge, 0, log_path=logs / "judge-0.log")]


def train(config: RunConfig, servers: list[VllmServer], mode: str, output: Path, core: int) -> list[dict[str, Any]]:
    """Run stage 2 with the product's own command; its metrics, row by row."""
    rollout, judge = servers
    overrides = [
        f"run.output_dir={output}",
        f"rollout.urls={json.dumps([rollout.url])}",
        f"judge.urls={json.dumps([judge.url])}",
        f"asynchrony.mode={mode}",
    ]
    environment = os.environ | {"R1REWARD_SERVER_TOKEN": rollout.token, "OPENAI_API_KEY": judge.token}
    with on_core(core):
        command = [
            sys.executable,
            "-m",
            "megatron_r1reward.cli",
            "rl",
            str(config.run.output_dir / "run.toml"),
            *overrides,
        ]
        subprocess.run(command, env=environment, check=True)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def heldout(config: RunConfig, server: VllmServer, pairs: int) -> EvaluationResult:
    """What the weights that the server holds now say about held-out pairs."""
    assert config.evaluation.data is not None
    scratch = config.run.output_dir
    data = read_preferences(
        config.evaluation.data, media_dir=scratch / "media", quarantine=scratch / "heldout-quarantine.jsonl"
    )
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, local_files_only=True)
    builder = PromptBuilder(tokenizer, config.data.max_prompt_tokens)
    os.environ["R1REWARD_SERVER_TOKEN"] = server.token
    asked = config.model_copy(update={"rollout": config.rollout.model_copy(update={"urls": (server.url,)})})
    with open_evaluation_pool(asked) as pool:
        return evaluate(
            data.preferences[:pairs], pool, builder, config.sampling, samples=1, voting=(1,), seed=1, transcripts=0
        )


def row_of(mode: str, turns: list[list[dict[str, Any]]], found: EvaluationResult) -> dict[str, Any]:
    """`turns`: the metrics of each."""
    timed = [line for metrics in turns for line in metrics[WARM_UP:]]
    seconds = sum(m[-1]["time"] - m[WARM_UP - 1]["time"] - m[-1].get("time/save", 0.0) for m in turns)
    row: dict[str, Any] = {"mode": mode, "steps/s": len(timed) / seconds}
    for phase in COLUMNS[2:9]:
        row[phase] = sum(line[f"time/{phase}"] for line in timed) / len(timed)
    return row | {"accuracy": found.accuracy, "low": found.interval[0], "high": found.interval[1]}


def measure(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    config = configuration(options.demo, scratch, options)
    dump_config(config, scratch / "run.toml")
    server_core, trainer_core = options.cores
    servers = servers_of(config, scratch / "logs", options.demo)
    turns: dict[str, list[list[dict[str, Any]]]] = {mode: [] for mode in MODES}
    found: dict[str, EvaluationResult] = {}
    try:
        with on_core(server_core):
            start_servers(servers, print)
        for turn in range(options.turns):
            for mode in MODES:
                output = scratch / f"{mode}-{turn}"
                turns[mode].append(train(config, servers, mode, output, trainer_core))
                if turn == options.turns - 1:
                    found[mode] = heldout(config, servers[0], options.pairs)
                if options.keep is not None:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    for name in ("metrics.jsonl", "timeline.jsonl"):
                        (options.keep / f"{mode}-{turn}-{name}").write_text((output / name).read_text())
    finally:
        for server in servers:
            server.close()
    return [row_of(mode, turns[mode], found[mode]) for mode in MODES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished demo; only read")
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--turns", type=int, default=2, help="runs of each mode")
    parser.add_argument("--batch", type=int, default=128, help="prompts per step")
    parser.add_argument("--pairs", type=int, default=400, help="held-out pairs, each asked once in both orders")
    parser.add_argument("--cores", type=int, nargs=2, default=(0, 1), help="of the servers, and of the trainer")
    parser.add_argument("--keep", type=Path, help="folder for metrics and timelines of both runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    options.demo = options.demo.resolve()
    if not (options.demo / "judge" / "hf").is_dir():
        parser.error(f"{options.demo} is not a finished demo: run make demo, or name one with --demo")
    if options.steps < WARM_UP + 2:
        parser.error(f"--steps must be at least {WARM_UP + 2}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # end the servers, too
    with tempfile.TemporaryDirectory(prefix="asynchrony-") as scratch:
        rows = measure(options, Path(scratch))
    print_table(COLUMNS, rows)
    synchronous, overlapped = rows
    ratio = overlapped["steps/s"] / synchronous["steps/s"]
    inside = synchronous["low"] <= overlapped["accuracy"] <= synchronous["high"]
    write_json(options.json, "asynchrony", rows, ratio=ratio, accuracy_inside=inside, steps=options.steps,
               turns=options.turns, batch=options.batch, cores=list(options.cores))  # fmt: skip
    print(
        f"one_step_off: {ratio:.2f} times the steps per second of synchronous (goal {GOAL_RATIO}); held-out accuracy "
        f"{overlapped['accuracy']:.1%}, {'inside' if inside else 'OUTSIDE'} of {synchronous['low']:.1%} to "
        f"{synchronous['high']:.1%}"
    )
    return int(options.check and not (ratio >= GOAL_RATIO and inside))


if __name__ == "__main__":
    sys.exit(main())
