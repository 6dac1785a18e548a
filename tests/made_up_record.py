"""A record of rollouts that nobody sampled: RL of a tiny model in a test without servers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.reward.score import count
from megatron_r1reward.rollout.accounting import Accounting
from megatron_r1reward.training.record import Recorder, origin_of
from megatron_r1reward.training.step_sampler import GeneratedStep, StepRollouts
from megatron_r1reward.types import Prompt, Rollout, ScoredRollout, WeightSpan

TEXT_IDS = 256  # of a tiny model's vocabulary: none of them is special
COUNTS = count([]) | dict.fromkeys(("judge_cached", "judge_over_budget", "judge_not_tried", "judge_steps_without"), 0)


def write_made_up_record(
    config: RunConfig, images: Sequence[str], *, image_token_id: int, seed: int = 0
) -> list[StepRollouts]:
    """Fill `rl.replay` for all steps of `config`; returns the batches. Every second prompt has an image. Lengths vary
    by a factor of ten; where there are groups, every third earned one reward for all of its samples."""
    assert config.rl.replay is not None
    random = np.random.default_rng(seed)
    recorder = Recorder(config.rl.replay, origin_of(config, {"made": "up"}), resumed_step=None)
    batches = []
    for step in range(config.rl.steps):
        scored = [
            rollout
            for number in range(config.rl.rollout_batch_size)
            for rollout in _group(config, step, number, images, image_token_id, random)
        ]
        account = Accounting(asked=config.rl.rollout_batch_size, answered=config.rl.rollout_batch_size)
        generated = GeneratedStep(step=step, rollouts=(), accounting=account, seconds=0.0)
        batches.append(StepRollouts(generated=generated, scored=tuple(scored), counts=COUNTS, seconds=0.0))
        recorder.write(batches[-1])
    return batches


def _group(
    config: RunConfig, step: int, number: int, images: Sequence[str], image_token_id: int, random: np.random.Generator
) -> list[ScoredRollout]:
    shown = (images[number // 2 % len(images)],) if number % 2 else ()
    text = random.integers(0, TEXT_IDS, int(random.integers(5, 50)))
    prompt = Prompt(
        id=f"{step}/{number}", preference_id=f"p{number}", token_ids=(*[image_token_id] * len(shown), *map(int, text)),
        image_paths=shown, label=1, swapped=False,
    )  # fmt: skip
    samples = config.algorithm.samples_per_prompt
    rewards = random.integers(0, 2, samples) * (1 if samples == 1 or number % 3 else 0)
    return [_scored(prompt, step, i, float(reward), random) for i, reward in enumerate(rewards)]


def _scored(prompt: Prompt, step: int, sample: int, reward: float, random: np.random.Generator) -> ScoredRollout:
    length = int(random.integers(3, 30))
    rollout = Rollout(
        prompt=prompt,
        sample_index=sample,
        token_ids=tuple(map(int, random.integers(0, TEXT_IDS, length))),
        log_probs=tuple(map(float, -random.exponential(5.0, length))),
        text="",
        finish_reason="stop",
        weight_spans=(WeightSpan(version=step, start=0, end=length),),
    )
    return ScoredRollout(
        rollout=rollout, format_reward=0.0, result_reward=reward, consistency_reward=0.0, reward=reward, predicted=None,
        verdict="not_asked",
    )  # fmt: skip


def replay_config(folder: Path, model: Path, **changed: dict[str, Any]) -> RunConfig:
    """Three steps of two updates each, recorded in `folder`/record. `changed`: keys by section."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"output_dir": folder / "run"},
        "model": {"path": model, "precision": "fp32"},
        "data": {"train": folder / "gone.jsonl", "token_budget": 2048},
        # eps: where a gradient is rounding, Adam's first step would be the rate times the sign of a rounding error.
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup_fraction": 0.0, "eps": 1e-5},
        "rl": {"steps": 3, "rollout_batch_size": 8, "train_batch_size": 4, "replay": folder / "record"},
        "algorithm": {"mismatch_alarm": 100.0, "mismatch_share_alarm": 1.0},
        "checkpoint": {"save_every": 100},
        "monitor": {"tensorboard": False},
    }
    return RunConfig.model_validate(tree | {name: tree.get(name, {}) | keys for name, keys in changed.items()})


def elsewhere(config: RunConfig, output: Path, **changed: dict[str, Any]) -> RunConfig:
    """The same with another run directory."""
    tree = config.model_dump()
    tree["run"]["output_dir"] = output
    return RunConfig.model_validate(tree | {name: tree[name] | keys for name, keys in changed.items()})
