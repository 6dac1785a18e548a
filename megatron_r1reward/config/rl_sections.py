"""Sections of the run file that say how stage 2 learns: steps, asynchrony, algorithm."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_r1reward.config.section import Fraction, PositiveInt, Section


class RlSection(Section):
    steps: PositiveInt = 100  # rollout batches
    rollout_batch_size: PositiveInt = 256  # prompts per step
    train_batch_size: PositiveInt = 128  # prompts (times samples_per_prompt rollouts) per optimizer step
    # Further rounds of generation per step, each with other prompts in place of those whose samples were all right or
    # all wrong; when they are used up the step goes on with what there is. 0: off
    dynamic_sampling_rounds: Annotated[int, Field(ge=0)] = 0
    heldout_every: PositiveInt | None = None  # steps between accuracy probes on evaluation.data; None: no probes
    heldout_pairs: PositiveInt = 128  # a sample of the pairs for a probe, each asked once in both orders
    record: Path | None = None  # folder that keeps every step's rollouts, with rewards, log-probs and weight versions
    replay: Path | None = None  # folder of such a record: train from it alone, without servers and judge

    @model_validator(mode="after")
    def _divides(self) -> RlSection:
        if self.rollout_batch_size % self.train_batch_size:
            raise ValueError(
                f"rl.rollout_batch_size {self.rollout_batch_size} is not a multiple of "
                f"rl.train_batch_size {self.train_batch_size}: choose a divisor"
            )
        if self.record is not None and self.replay is not None:
            raise ValueError(f"rl.replay {self.replay} samples nothing that rl.record could keep: set one of them")
        return self


class AsynchronySection(Section):
    """Whether rollouts are sampled while the policy is trained; docs/rollout.md."""

    # one_step_off: the next batch is sampled, by the weights before the update, while this one is trained on.
    # in_flight: weights change under running requests.
    mode: Literal["synchronous", "one_step_off", "in_flight"] = "synchronous"
    batches_ahead: PositiveInt = 1  # in_flight: so many batches are being sampled while one is trained on
    max_staleness: PositiveInt = 1  # steps; samples with a token of older weights are sampled again before the step

    @model_validator(mode="after")
    def _one_step(self) -> AsynchronySection:
        if self.mode == "one_step_off" and self.batches_ahead != 1:
            raise ValueError(
                f"one_step_off samples one batch ahead, batches_ahead is {self.batches_ahead}: set it to 1, or mode to "
                "'in_flight'"
            )
        return self


class AlgorithmSection(Section):
    """StableReinforce. Defaults are the paper's; `docs/algorithm.md` lists where the released code differs."""

    gamma: Fraction = 1.0
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0  # KL to the reference inside the reward
    kl_loss_coefficient: Annotated[float, Field(ge=0)] = 0.0  # KL to the reference as a term of the loss
    kl_loss_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_loss_bound: Annotated[float, Field(ge=0)] = 10.0  # of k3: nats per token above which it stops pulling; 0: none
    samples_per_prompt: PositiveInt = 1
    baseline: Literal["none", "group_mean", "leave_one_out"] = "none"
    group_normalize: bool = False  # GRPO: divide by the group's standard deviation
    normalize: Literal["global", "none"] = "global"
    filter: Literal["paper", "released_code", "none"] = "paper"
    filter_sigma: Annotated[float, Field(gt=0)] = 3.0
    preclip: bool = True
    preclip_min: Annotated[float, Field(gt=0)] = 1e-3
    preclip_max: Annotated[float, Field(gt=0)] = 1e3
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    entropy_coefficient: float = 0.0
    mismatch_alarm: Annotated[float, Field(gt=0)] = 0.1  # mean |log-prob gap| to the sampler above which a step warns
    mismatch_threshold: Annotated[float, Field(gt=0)] = 0.5  # nats; a token with a larger gap counts as beyond
    mismatch_share_alarm: Fraction = 0.01  # share of tokens beyond mismatch_threshold above which a step warns
    # of the ratio: "sampler" saves the trainer's pass over the batch before the update, where both are the same
    old_log_probs: Literal["trainer", "sampler"] = "trainer"
    truncated_importance_sampling: Annotated[float, Field(gt=0)] | None = None
    aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = "sequence_mean"
    constant_length: PositiveInt = 1024
    skip_idle_sequences: bool = True  # an update leaves out responses without any advantage; same gradient
    fused_loss: bool = True  # the LM head forms the loss; false: plain torch behind its log-probs

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the initial policy has to be kept."""
        return self.kl_coefficient > 0 or self.kl_loss_coefficient > 0

    @model_validator(mode="after")
    def _bounds(self) -> AlgorithmSection:
        if not self.preclip_min < 1.0 < self.preclip_max:
            raise ValueError(f"preclip_min {self.preclip_min} and preclip_max {self.preclip_max} must enclose 1")
        if self.baseline != "none" and self.samples_per_prompt == 1:
            raise ValueError(f"baseline {self.baseline!r} compares samples of one prompt: set samples_per_prompt > 1")
        if self.group_normalize and self.baseline == "none":
            raise ValueError("group_normalize divides by a group's deviation: set baseline to 'group_mean' with it")
        return self
