"""Small RL runs in this process: a random tiny model, digits, and a server that is shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.reward.readers import reader_of
from megatron_r1reward.reward.score import RewardScorer
from megatron_r1reward.rollout.accounting import Accounting
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.training import rl

STEPS, BATCH = 4, 6


def config(output: Path, model: Path, data: Path, mode: str, /, **changed: dict[str, Any]) -> RunConfig:
    """A random model earns no reward: the entropy bonus is what moves its weights. `changed`: keys by section."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"output_dir": output},
        "model": {"path": model, "precision": "fp32"},
        "data": {"train": data / "pool.jsonl", "token_budget": 4096, "max_pixels": 50_176},
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0},
        "rl": {"steps": STEPS, "rollout_batch_size": BATCH, "train_batch_size": BATCH, "heldout_every": 3},
        "asynchrony": {"mode": mode},
        "algorithm": {
            "samples_per_prompt": 2, "baseline": "leave_one_out", "entropy_coefficient": 0.1,
            "truncated_importance_sampling": 2.0, "mismatch_alarm": 100.0, "mismatch_share_alarm": 1.0,
        },
        "reward": {"use_judge": False},
        "sampling": {"max_tokens": 24},
        "checkpoint": {"save_every": 2},
        "monitor": {"tensorboard": False},
    }  # fmt: skip
    return RunConfig.model_validate(tree | {name: tree.get(name, {}) | keys for name, keys in changed.items()})


def run(config: RunConfig, topology: Topology, pool: RolloutPool, probe: rl.Probe = lambda: 0.5) -> Accounting:
    """What became of the prompts of this run."""
    pool.total = Accounting()
    scorer = RewardScorer(config.reward, None, read=reader_of(config))
    rl.run(config, topology, rl.Services(pool=pool, scorer=scorer, probe=probe))
    return pool.total


def rows(config: RunConfig) -> dict[int, dict[str, Any]]:
    lines = (config.run.output_dir / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}
