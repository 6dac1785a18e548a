"""Every method of `algorithm.method` with real servers: one override of the demo's run file, killed and resumed.

    python benchmarks/methods_resume.py runs/demo [--work runs/methods_resume] [--method ppo ...]
        [--json FILE] [--check]

A run of a method is `r1reward rl recipes/demo/rl.toml algorithm.method=METHOD`, small by keys that all share.
One vLLM server samples for all of them, and its chat route stands in for the judge. Each method runs three times: left
alone, killed (SIGKILL) as soon as the step after a checkpoint is written, and the killed one again to its end. Compared
is every step's loss, gradient norm and mean reward, as the largest relative difference; a server's log-probs depend on
what else is in its batch in the last bits, so the goal is GOAL and not 0.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from reporting import print_table, write_json

from megatron_r1reward.config.methods import METHODS
from megatron_r1reward.config.schema import ServerSection
from megatron_r1reward.network.tokens import TOKEN_VARIABLE
from megatron_r1reward.servers.process import VllmServer

RUN_FILE = Path(__file__).parents[1] / "recipes" / "demo" / "rl.toml"
STEPS, SAVE_EVERY, KILL_AFTER = 6, 2, 3
COMPARED = ("loss", "grad_norm", "reward/mean")
GOAL = 2e-3


def command(method: str, demo: Path, server: VllmServer, output: Path) -> list[str]:
    """The user's command with one override, and what makes every run small."""
    small = {
        "run.output_dir": output,
        "run.local_ranks": 1,
        "model.path": demo / "sft" / "hf",
        "data.train": demo / "data" / "pool.jsonl",
        "evaluation.data": demo / "data" / "heldout.jsonl",
        "rollout.urls": json.dumps([server.url]),
        "judge.urls": json.dumps([server.url]),
        "rl.steps": STEPS,
        "rl.rollout_batch_size": 16,
        "rl.train_batch_size": 8,
        "rl.heldout_every": STEPS,
        "rl.heldout_pairs": 8,
        "checkpoint.save_every": SAVE_EVERY,
    }
    program = [sys.executable, "-m", "megatron_r1reward.cli", "rl", str(RUN_FILE), f"algorithm.method={method}"]
    return program + [f"{key}={value}" for key, value in small.items()]


def steps_of(run: Path) -> dict[int, dict[str, float]]:
    """Rows of metrics.jsonl by step; a line that is being written is left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row for row in rows}


def call(words: list[str], output: Path, environment: dict[str, str], *, kill: bool = False) -> int:
    """Run one command to its end, or kill its whole session after step `KILL_AFTER`; the exit code."""
    with output.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        while process.poll() is None:
            if kill and max(steps_of(output), default=0) >= KILL_AFTER:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.05)
    return process.returncode


def measure(method: str, demo: Path, server: VllmServer, work: Path) -> dict[str, Any]:
    """The row of one method.

    Raises:
        RuntimeError: a run failed, or ended before it could be killed.
    """
    environment = os.environ | {TOKEN_VARIABLE: server.token, "OPENAI_API_KEY": server.token}
    began, runs = time.monotonic(), {name: work / f"{method}-{name}" for name in ("alone", "killed")}
    for run in runs.values():
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        run.with_suffix(".log").unlink(missing_ok=True)
    commands = {name: command(method, demo, server, run) for name, run in runs.items()}
    codes = [call(commands["alone"], runs["alone"], environment)]
    codes.append(call(commands["killed"], runs["killed"], environment, kill=True))
    seen = max(steps_of(runs["killed"]), default=0)
    codes.append(call(commands["killed"], runs["killed"], environment))
    if codes != [0, -signal.SIGKILL, 0]:
        raise RuntimeError(f"{method}: exit codes {codes}, wanted 0, {-signal.SIGKILL}, 0: see {work / method}-*.log")
    whole, resumed = steps_of(runs["alone"]), steps_of(runs["killed"])
    assert sorted(whole) == sorted(resumed) == list(range(1, STEPS + 1)), (sorted(whole), sorted(resumed))
    gaps = {
        name: max(abs(resumed[step][name] - row[name]) / max(abs(row[name]), 1e-2) for step, row in whole.items())
        for name in COMPARED
    }
    return {
        "method": method,
        "killed after step": seen,
        **{f"{name} gap": gap for name, gap in gaps.items()},
        "gradient norm": math.fsum(row["grad_norm"] for row in whole.values()) / STEPS,
        "seconds": time.monotonic() - began,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, nargs="?", default=Path("runs/demo"), help="a finished `make demo`")
    parser.add_argument("--work", type=Path, default=Path("runs/methods_resume"))
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 when a method misses the goal")
    options = parser.parse_args()
    demo, work = options.demo.resolve(), options.work.resolve()
    if not (demo / "sft" / "hf" / "config.json").exists():
        parser.error(f"{demo} holds no sft/hf: run `make demo` first, or name a finished one")
    work.mkdir(parents=True, exist_ok=True)
    section = ServerSection(dtype="float32", max_model_len=512, max_num_seqs=64, kv_cache_bytes=1 << 27)
    rows: list[dict[str, Any]] = []
    with VllmServer(
        section,
        model_path=demo / "sft" / "hf",
        log_path=work / "server.log",
        weight_transfer="gloo",
        media_root=demo,
        pixels=(3136, 501_760),
    ) as server:
        for method in options.method:
            rows.append(measure(method, demo, server, work))
            print(json.dumps(rows[-1]), flush=True)
            write_json(options.json, "methods_resume", rows, steps=STEPS, saved_every=SAVE_EVERY, goal=GOAL)
    print_table(list(rows[0]), rows)
    worst = max(row[f"{name} gap"] for row in rows for name in COMPARED)
    print(f"{len(rows)} methods killed and resumed; largest relative difference {worst:.2g} (goal {GOAL:g})")
    return 1 if options.check and not worst < GOAL else 0


if __name__ == "__main__":
    sys.exit(main())
