"""Rollouts without servers: prompts, answers and the versions of the weights that gave them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1reward.rollout.accounting import Accounting
from megatron_r1reward.training.step_sampler import GeneratedStep, StepRollouts
from megatron_r1reward.types import Prompt, Rollout, ScoredRollout, WeightSpan


def prompt(name: str) -> Prompt:
    return Prompt(id=name, preference_id=name, token_ids=(1, 2), image_paths=(), label=1, swapped=False)


def rollout(of: Prompt, versions: Sequence[int], *, answer: int = 1, sample: int = 0) -> Rollout:
    """One token per entry of `versions`."""
    return Rollout(
        prompt=of,
        sample_index=sample,
        token_ids=tuple(range(len(versions))),
        log_probs=tuple(-1.0 / 3 for _ in versions),
        text=f"<think>because</think><answer>{answer}</answer>",
        finish_reason="stop",
        weight_spans=tuple(WeightSpan(version=v, start=i, end=i + 1) for i, v in enumerate(versions)),
    )


def scored(of: Rollout) -> ScoredRollout:
    return ScoredRollout(
        rollout=of, format_reward=1.0, result_reward=1.0, consistency_reward=0.1 + 0.2, reward=1.5, predicted=1,
        verdict="not_asked",
    )  # fmt: skip


def generated(step: int, rollouts: Sequence[Rollout]) -> GeneratedStep:
    return GeneratedStep(step=step, rollouts=tuple(rollouts), accounting=Accounting(asked=len(rollouts)), seconds=0.0)


def step_rollouts(of: GeneratedStep) -> StepRollouts:
    return StepRollouts(generated=of, scored=tuple(map(scored, of.rollouts)), counts={"unparsable": 0}, seconds=0.0)
