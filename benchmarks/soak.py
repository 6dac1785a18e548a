"""Hundreds of real RL steps of a tiny model, with a random fault every few steps; then everything is counted.

The trainer, two rollout servers and a judge are the product's own, on this machine. Faults are drawn from a seed: a
rollout server or the judge is killed, its worker is killed, it is stopped (SIGSTOP), or stopped for a moment.
Afterwards: exactly the asked steps in metrics.jsonl, each once; every prompt accounted for, and trained on in the step
that it was drawn for and in no other; the sampler's log-probabilities equal to the trainer's; no process, descriptor,
shared memory or temporary file more than before.

    python benchmarks/soak.py [--steps 300] [--fault-every 5] [--seed 0] [--layout colocated] [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import torch
from reporting import print_table, write_json

from megatron_r1reward.config.schema import RewardSection, RunConfig
from megatron_r1reward.data.loader import EpochSampler
from megatron_r1reward.demo.digits import build_digits
from megatron_r1reward.demo.pipeline import write_demo_model
from megatron_r1reward.launch.stage_servers import open_rl_services
from megatron_r1reward.parallel import setup
from megatron_r1reward.reward.consistency import ConsistencyJudge
from megatron_r1reward.reward.score import RewardScorer, ScoringBatch
from megatron_r1reward.rollout.accounting import Accounting
from megatron_r1reward.servers.keeper import shared_memory_mapped
from megatron_r1reward.servers.process import VllmServer
from megatron_r1reward.training import rl
from megatron_r1reward.types import Rollout, ScoredRollout
from megatron_r1reward.weight_sync.broadcast_group import listen

BATCH = 8
COLUMNS = ("measure", "value", "expected")


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """What a run must not leave more of than it found, each thing by name."""

    processes: tuple[str, ...]
    descriptors: tuple[str, ...]
    shared_memory: tuple[str, ...]
    scratch_folders: tuple[str, ...]

    @classmethod
    def now(cls) -> Leftovers:
        gc.collect()
        children = psutil.Process().children(recursive=True)
        return cls(
            processes=tuple(f"{child.pid} {' '.join(child.cmdline())[:200]}" for child in children),
            descriptors=tuple(filter(None, map(open_file, os.listdir("/proc/self/fd")))),
            shared_memory=tuple(path.name for path in set(Path("/dev/shm").iterdir()) - used_by_others(children)),
            scratch_folders=tuple(map(str, Path(tempfile.gettempdir()).glob("r1reward-server-*"))),
        )

    def beyond(self, before: Leftovers) -> dict[str, list[str]]:
        """What is here and was not `before`, by kind."""
        return {
            kind: sorted((collections.Counter(now) - collections.Counter(getattr(before, kind))).elements())
            for kind, now in vars(self).items()
        }


def used_by_others(children: Sequence[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that processes of this machine have mapped which are neither this one nor its `children`."""
    ours = {os.getpid(), *(child.pid for child in children)}
    found: set[Path] = set()
    for pid in set(psutil.pids()) - ours:
        with suppress(OSError):
            found |= shared_memory_mapped(pid)
    return found


def start_what_stays() -> None:
    """What Python and torch start once per process and never again, so that it is no leak of the run."""
    resource_tracker.ensure_running()
    listen("127.0.0.1", 10.0)  # torch's first TCPStore opens a pipe


def open_file(descriptor: str) -> str | None:
    """What a descriptor of this process refers to; None when it has been closed meanwhile."""
    with suppress(OSError):
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return None


class RecordingScorer(RewardScorer):
    """Remembers what it scored: what comes out of it is what the step trains on."""

    def __init__(self, section: RewardSection, judge: ConsistencyJudge | None) -> None:
        super().__init__(section, judge)
        self.steps: list[list[str]] = []  # ids of preferences, by step

    @contextmanager
    def begin(self) -> Iterator[ScoringBatch]:
        with super().begin() as batch:
            yield RecordingBatch(batch, self.steps)


class RecordingBatch(ScoringBatch):
    """Remembers what a batch comes to at its end."""

    def __init__(self, batch: ScoringBatch, steps: list[list[str]]) -> None:
        self.__dict__.update(batch.__dict__)
        self._steps = steps

    def finish(self, rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], dict[str, int]]:
        scored, counts = super().finish(rollouts)
        self._steps.append([one.rollout.prompt.preference_id for one in scored])
        return scored, counts


def drawn(config: RunConfig) -> list[list[str]]:
    """Ids of the preferences that each step should train on."""
    ids = [json.loads(line)["id"] for line in config.data.train.read_text().splitlines()]
    sampler = EpochSampler(len(ids), seed=config.run.seed)
    return [[ids[draw.index] for draw in sampler.batch(step, BATCH)] for step in range(config.rl.steps)]


@dataclass
class Injector:
    """Breaks a server every `every` steps, in a thread; faults and their times depend on the seed and the steps."""

    servers: dict[str, VllmServer]
    metrics: Path
    every: int
    steps: int  # none is injected after the last one
    rng: random.Random
    done: collections.Counter[str] = field(default_factory=collections.Counter)
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        next_step = self.every
        while next_step < self.steps and not self._stop.wait(0.02):
            if steps_done(self.metrics) >= next_step:
                next_step += self.every
                self.inject()

    def stop(self) -> None:
        self._stop.set()

    def inject(self) -> None:
        name = self.rng.choice(sorted(self.servers))
        kinds = sorted(FAULTS)
        fault = self.rng.choices(kinds, weights=[FAULTS[kind][1] for kind in kinds])[0]
        self._stop.wait(self.rng.uniform(0, 0.3))  # anywhere in a step
        pid = self.servers[name].pid
        if pid is None:
            self.done["nobody there"] += 1
            return
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            FAULTS[fault][0](pid)
            self.done[f"{fault} ({name.split('-')[0]})"] += 1


def kill_server(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def kill_worker(pid: int) -> None:
    children = psutil.Process(pid).children(recursive=True)
    if children:
        children[-1].kill()


def stop_for_ever(pid: int) -> None:
    os.killpg(pid, signal.SIGSTOP)


def stop_for_a_moment(pid: int) -> None:
    os.killpg(pid, signal.SIGSTOP)
    time.sleep(1.0)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGCONT)


# name: (what it does, how often it is drawn); a restart takes long, so the faults that need one are rarer
FAULTS: dict[str, tuple[Callable[[int], None], float]] = {
    "kill server": (kill_server, 1),
    "kill worker": (kill_worker, 1),
    "stop for ever": (stop_for_ever, 0.5),
    "stop for a moment": (stop_for_a_moment, 3),
}


def steps_done(metrics: Path) -> int:
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def run_file(root: Path, steps: int, seed: int, layout: str) -> RunConfig:
    data = root / "data"
    build_digits(data, seed=seed, sft_rows=48, pool_rows=96, heldout_pairs=12, judge_rows=48)
    model = root / "model"
    write_demo_model(model, [data / "sft.jsonl"], seed=seed)
    server: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 512, "max_num_seqs": 32, "kv_cache_bytes": 1 << 26,
        "health_interval_s": 0.5, "health_timeout_s": 5.0, "health_failures": 2, "request_failures": 2,
        "request_timeout_s": 30.0, "backoff_s": 0.05, "backoff_max_s": 1.0,
        "max_restarts": 10,
    }  # fmt: skip
    return RunConfig.model_validate(
        {
            "run": {"output_dir": root / "run", "seed": seed, "num_threads": 1},
            "model": {"path": model, "precision": "fp32"},
            "data": {"train": data / "pool.jsonl", "token_budget": 4096},
            "optimizer": {"lr": 1e-4, "schedule": "constant"},
            "rl": {"steps": steps, "rollout_batch_size": BATCH, "train_batch_size": BATCH},
            "sampling": {"max_tokens": 24},
            "rollout": {**server, "count": 2, "push_timeout_s": 60.0},
            "judge": {
                **server, "model_path": model, "max_tokens": 4, "request_timeout_s": 3.0, "retries": 1,
                "max_steps_without_judge": steps,
            },
            "checkpoint": {"save_every": max(steps // 3, 1)},
            "monitor": {"tensorboard": False},
            "cluster": {"layout": layout},
        }
    )  # fmt: skip


def soak(
    root: Path, *, steps: int, every: int, seed: int, layout: str
) -> tuple[list[dict[str, Any]], collections.Counter[str]]:
    """Run, then one row per claim: measure, value, expected."""
    config = run_file(root, steps, seed, layout)
    topology = setup.initialize(config.parallel, seed=seed)
    start_what_stays()
    before = Leftovers.now()
    metrics = config.run.output_dir / "metrics.jsonl"
    with ExitStack() as stack:
        opened = stack.enter_context(open_rl_services(config))
        members = [*opened.pool.group.members, *(opened.judge_servers.members if opened.judge_servers else ())]
        injector = Injector(
            servers={member.name: member.server for member in members if member.server is not None},
            metrics=metrics,
            every=every,
            steps=steps,
            rng=random.Random(seed),
        )
        thread = threading.Thread(target=injector.run)
        thread.start()
        stack.callback(thread.join)
        stack.callback(injector.stop)
        scorer = RecordingScorer(config.reward, opened.judge)
        rl.run(config, topology, rl.Services(pool=opened.pool, scorer=scorer))
        account: Accounting = opened.pool.total
        restarts = sum(row.restarts for row in opened.pool.status())
    left = Leftovers.now().beyond(before)
    for kind, names in left.items():
        print(*(f"{kind} left: {name}" for name in names), sep="\n")
    rows_of_steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    print(f"accounting: {account}")
    rows: list[dict[str, Any]] = [
        {"measure": "steps, in order", "value": [row["step"] for row in rows_of_steps] == list(range(1, steps + 1)),
         "expected": True},
        {"measure": "prompts answered", "value": account.answered, "expected": steps * BATCH},
        {"measure": "prompts failed", "value": account.failed, "expected": 0},
        {"measure": "each step trained on its prompts", "value": scorer.steps == drawn(config), "expected": True},
        {"measure": "largest sampler gap below 1e-3",
         "value": max(row["mismatch/max_abs"] for row in rows_of_steps) < 1e-3, "expected": True},
        *({"measure": f"{kind} left", "value": len(names), "expected": 0} for kind, names in left.items()),
        {"measure": "faults", "value": sum(injector.done.values()), "expected": (steps - 1) // every},
        {"measure": "restarts of rollout servers", "value": restarts},
    ]  # fmt: skip
    return rows, injector.done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--fault-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=["split", "colocated"], default="split", help="colocated: servers sleep")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        rows, faults = soak(
            Path(scratch), steps=options.steps, every=options.fault_every, seed=options.seed, layout=options.layout
        )
    minutes = (time.monotonic() - started) / 60
    for fault, count in sorted(faults.items()):
        print(f"{count:4d} x {fault}")
    print_table(COLUMNS, rows)
    write_json(
        options.json, "soak", rows, faults=dict(faults), minutes=minutes, seed=options.seed, layout=options.layout
    )
    broken = [row["measure"] for row in rows if "expected" in row and not holds(row)]
    verdict = "everything accounted for" if not broken else f"NOT as expected: {', '.join(broken)}"
    print(f"{options.steps} steps with {sum(faults.values())} faults in {minutes:.1f} minutes: {verdict}")
    return int(bool(options.check and broken))


def holds(row: dict[str, Any]) -> bool:
    """Everything is exact, but the last fault may come too late to be one."""
    if row["measure"] == "faults":
        return row["expected"] - 1 <= row["value"] <= row["expected"]
    return row["value"] == row["expected"]


if __name__ == "__main__":
    sys.exit(main())
