"""What a stage's exported folder will say about itself (`prompt_policy`): how it is asked, and by what it was made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_r1reward import __version__
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.data.preference_row import SftExample
from megatron_r1reward.data.prompt import is_filled
from megatron_r1reward.data.stage_data import SCALAR_TEMPLATE, kind_of, template_of
from megatron_r1reward.hub_name import model_name
from megatron_r1reward.model_folder.prompt_policy import Kind, PromptPolicy, TrainedStage, read_policy
from megatron_r1reward.reward.readers import parser_of


def sft_policy(config: RunConfig, examples: Sequence[SftExample], *, steps: int) -> PromptPolicy | None:
    """None unless the model learned to judge: most rows are a filled template. A consistency judge is none."""
    template = template_of(config)
    filled = sum(is_filled(_user_text(example), template) for example in examples)
    if 2 * filled <= len(examples):
        return None
    settings = {
        "steps": steps,
        "global_batch_size": config.sft.global_batch_size,
        "learning_rate": config.optimizer.lr,
        "precision": config.model.precision,
    }
    return _policy(config, template, "sft", rows=len(examples), steps=steps, settings=settings)


def rl_policy(config: RunConfig, *, rows: int | None) -> PromptPolicy:
    settings = {
        "method": config.algorithm.method,
        "steps": config.rl.steps,
        "rollout_batch_size": config.rl.rollout_batch_size,
        "train_batch_size": config.rl.train_batch_size,
        "epochs_per_batch": config.rl.epochs_per_batch,
        "samples_per_prompt": config.algorithm.samples_per_prompt,
        "learning_rate": config.optimizer.lr,
        "precision": config.model.precision,
        "temperature": config.sampling.temperature,
        "max_tokens": config.sampling.max_tokens,
        "consistency_judge": config.reward.use_judge,
        "response_order": config.response_order,
        "reward": {term.name: term.weight for term in config.reward.all_terms},
    }
    template = template_of(config)
    return _policy(config, template, "rl", rows=rows, steps=config.rl.steps, settings=settings)


def rm_policy(config: RunConfig, *, rows: int, steps: int) -> PromptPolicy:
    settings = {
        "steps": steps,
        "global_batch_size": config.reward_model.global_batch_size,
        "margin": config.reward_model.margin,
        "learning_rate": config.optimizer.lr,
        "precision": config.model.precision,
    }
    return _policy(config, SCALAR_TEMPLATE, "rm", rows=rows, steps=steps, settings=settings, kind="scalar")


def _policy(
    config: RunConfig,
    template: str,
    stage: Any,
    *,
    rows: int | None,
    steps: int,
    settings: dict[str, Any],
    kind: Kind | None = None,
) -> PromptPolicy:
    before, kind = read_policy(config.model.path), kind or kind_of(config)
    asked = before.orders if before is not None and not before.reads_one_response else "both"
    trained = TrainedStage(
        stage=stage,
        version=__version__,
        base=model_name(config.model.path),
        data=Path(config.data.train).name,
        rows=rows,
        steps=steps,
        settings=settings,
    )
    return PromptPolicy(
        kind=kind,
        template=template,
        orders=asked if kind == "generative" else "any",  # the others read one response at a time
        min_pixels=config.data.min_pixels,
        max_pixels=config.data.max_pixels,
        parser=parser_of(config),
        stages=(*(before.stages if before is not None else ()), trained),
    )


def _user_text(example: SftExample) -> str:
    turns = [turn for turn in example.messages if turn["role"] == "user"]
    return "".join(part["text"] for part in turns[-1]["content"] if part["type"] == "text") if turns else ""
