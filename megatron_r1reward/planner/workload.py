"""What passes through the model: lengths of sequences, contents of micro-batches, counts per step.

Lengths that the run file bounds are taken at their bound for memory; time uses the means of [plan].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.model_folder.shape import ModelShape
from megatron_r1reward.planner.planned_layout import Layout, Stage


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Tokens (image tokens included) of a packed micro-batch, its sequences, image patches and response tokens."""

    name: str
    tokens: int
    sequences: int
    patches: int
    responses: int
    longest: int  # tokens of its longest sequence


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Means and bounds of one optimizer step and, for RL, of one rollout batch."""

    prompt_tokens: int  # mean, images included
    image_tokens: int  # mean per prompt, part of prompt_tokens
    patches: int  # mean per prompt
    frame_patches: int  # of one image
    response_tokens: int  # mean
    longest: int
    sequences: int  # per optimizer step, all ranks
    optimizer_steps: int  # per step of the stage
    micro_batches: int  # per rank and optimizer step
    mean: MicroBatch  # as many mean sequences as the token budget holds
    largest: tuple[MicroBatch, ...]  # the budget used to the last token; one sequence as long as the run file allows

    @property
    def sequence_tokens(self) -> int:
        return self.prompt_tokens + self.response_tokens


def describe(config: RunConfig, shape: ModelShape, layout: Layout, stage: Stage) -> Workload:
    """Workload of `stage` on every data-parallel rank of `layout`."""
    plan, data = config.plan, config.data
    vision = shape.vision
    frame = vision.patches(min(plan.image_pixels or data.max_pixels, data.max_pixels))
    patches = frame * plan.images_per_prompt
    image_tokens = patches // vision.unit
    text = min(plan.text_tokens, data.max_prompt_tokens)
    response = min(plan.response_tokens, config.sampling.max_tokens) if stage == "rl" else plan.response_tokens
    mean = text + image_tokens + response
    bounds = [shape.text.max_positions]
    if stage == "rl":
        bounds.append(config.rollout.max_model_len)
    most_images = vision.patches(data.max_pixels) * plan.images_per_prompt
    # What is sampled ends at the sampling limit; what SFT reads is as long as it is.
    longest_response = config.sampling.max_tokens if stage == "rl" else plan.longest_response
    longest = min(data.max_prompt_tokens + most_images // vision.unit + longest_response, *bounds)
    mean = min(mean, longest)
    count = max(data.token_budget // mean, 1)
    typical = MicroBatch(
        name="mean",
        tokens=count * mean,
        sequences=count,
        patches=count * patches,
        responses=count * response,
        longest=mean,
    )
    single = MicroBatch(
        name="longest sequence",
        tokens=longest,
        sequences=1,
        patches=most_images,
        responses=longest_response,
        longest=longest,
    )
    samples = config.algorithm.samples_per_prompt
    sequences = config.sft.global_batch_size if stage == "sft" else config.rl.train_batch_size * samples
    per_rank = max(math.ceil(sequences / layout.dp), 1)
    return Workload(
        prompt_tokens=mean - response,
        image_tokens=image_tokens,
        patches=patches,
        frame_patches=frame,
        response_tokens=response,
        longest=longest,
        sequences=sequences,
        optimizer_steps=1 if stage == "sft" else config.rl.optimizer_steps,
        micro_batches=math.ceil(per_rank / count),
        mean=typical,
        largest=(replace(typical, name="full budget", tokens=max(data.token_budget, typical.tokens)), single),
    )
