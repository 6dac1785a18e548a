"""Sections of the run file that say how the stages learn: steps, asynchrony, reward, sampling, health, algorithm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_r1reward.config.methods import Method, with_defaults
from megatron_r1reward.config.section import Fraction, NotNegative, Positive, PositiveInt, Section
from megatron_r1reward.user_parts import names_a_function


class SftSection(Section):
    steps: PositiveInt | None = None  # None: one pass per epoch
    epochs: PositiveInt = 1  # exact passes; the last step takes what is left
    global_batch_size: PositiveInt = 256

    def steps_of(self, rows: int) -> int:
        """Of a run over so many rows."""
        return self.steps or math.ceil(self.epochs * rows / self.global_batch_size)


class RewardModelSection(SftSection):
    """`r1reward rm`: a scalar reward model on the Bradley-Terry loss; a batch is so many pairs."""

    margin: NotNegative = 0.0  # by which the better response has to win before the loss levels off
    score_layers: Literal[1, 2] | None = None  # of a new scalar head: 1 linear, 2 with a hidden layer and ReLU
    heldout_every: PositiveInt | None = None  # steps between accuracy probes on evaluation.data; None: no probes
    heldout_pairs: PositiveInt = 128  # a sample of the pairs for a probe


class RlSection(Section):
    steps: PositiveInt = 100  # rollout batches
    rollout_batch_size: PositiveInt = 256  # prompts per step
    train_batch_size: PositiveInt = 128  # prompts (times samples_per_prompt rollouts) per optimizer step
    epochs_per_batch: PositiveInt = 1  # passes of the optimizer over a rollout batch
    # both_orders: a step has rollout_batch_size / 2 pairs, each shown in both orders, which are one group;
    # pointwise: likewise, but a prompt shows one response, which is rated
    pairing: Literal["one_order", "both_orders", "pointwise"] = "one_order"
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
        if self.orders == 2 and self.rollout_batch_size % 2:
            raise ValueError(
                f"rl.pairing {self.pairing!r} asks two prompts about a pair, and rl.rollout_batch_size "
                f"{self.rollout_batch_size} is odd: make it even"
            )
        if self.record is not None and self.replay is not None:
            raise ValueError(f"rl.replay {self.replay} samples nothing that rl.record could keep: set one of them")
        return self

    @property
    def orders(self) -> int:
        """Prompts about each pair of a step."""
        return 1 if self.pairing == "one_order" else 2

    @property
    def mini_batches(self) -> int:
        """Optimizer steps of one pass over a rollout batch."""
        return self.rollout_batch_size // self.train_batch_size

    @property
    def optimizer_steps(self) -> int:
        """Of one step."""
        return self.mini_batches * self.epochs_per_batch


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


class PromptSection(Section):
    """How the model is asked and how its verdict is read, where that is not as published; docs/parts.md."""

    # pointwise: it rates one response at a time; None: as rl.pairing, else model.path says, else generative (a pair)
    kind: Literal["generative", "pointwise"] | None = None
    # file with {question}, {answer1}, {answer2}, or {question}, {answer}; None: what model.path says, or published
    template: Path | None = None
    # A reader's name, a regular expression, or "path/to/file.py:function"; None: what model.path says, or "answer"
    parser: str | None = None
    trust_parser: bool = False  # run the parser's code that model.path carries


Truncated = Literal["penalise", "mask", "as_is"]
AGREEMENT = "agreement"
BUILT_IN_TERMS = ("format", "result", "consistency", AGREEMENT)


class RewardTerm(Section):
    """One term of the reward: a built-in one, or a function of the user's that values all responses of a step."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    function: str | None = None  # "path/to/file.py:function"; None: the built-in term of this name

    @model_validator(mode="after")
    def _something(self) -> RewardTerm:
        if self.function is None and self.name not in BUILT_IN_TERMS:
            raise ValueError(
                f"reward.terms: {self.name!r} is none of the built-in {', '.join(BUILT_IN_TERMS)}: name its function, "
                '"path/to/file.py:function"'
            )
        if self.function is not None and self.name in BUILT_IN_TERMS:
            raise ValueError(f"reward.terms: {self.name!r} is a built-in term: give the function another name")
        if self.function is not None and not names_a_function(self.function):
            raise ValueError(
                f'reward.terms: function {self.function!r} of {self.name!r} is not of the form "path/to/file.py:name"'
            )
        return self


class RewardSection(Section):
    format_weight: NotNegative = 0.5
    consistency_weight: NotNegative = 0.5
    agreement_weight: NotNegative = 0.0  # agreeing with oneself in the other order; needs rl.pairing = "both_orders"
    terms: tuple[RewardTerm, ...] = ()  # in place of the above; none: format, result, consistency (and agreement)
    consistency_levels: Literal["paper", "released_code"] = "paper"  # {0, 1} or {-1, 0, 1}
    use_judge: bool = True
    # A response that the token limit cut off: penalise: it has not answered (F = A = 0), so the policy learns to end;
    # mask: it trains nothing (overlong filtering of DAPO); as_is: its text is scored, as in the released code.
    truncated: Truncated = "penalise"

    @property
    def all_terms(self) -> tuple[RewardTerm, ...]:
        """What the reward is the sum of."""
        if self.terms:
            return self.terms
        weights = {"format": self.format_weight, "result": 1.0, "consistency": self.consistency_weight}
        if self.agreement_weight:
            weights[AGREEMENT] = self.agreement_weight
        return tuple(RewardTerm(name=name, weight=weight) for name, weight in weights.items())

    @property
    def rewards_agreement(self) -> bool:
        """Whether something is earned without a label."""
        return any(term.name == AGREEMENT for term in self.all_terms)

    @model_validator(mode="after")
    def _terms(self) -> RewardSection:
        names = [term.name for term in self.terms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"reward.terms names {twice[0]!r} twice: give one of them another name")
        weights = ("format_weight", "consistency_weight", "agreement_weight")
        fields = type(self).model_fields
        if self.terms and (set_too := [key for key in weights if getattr(self, key) != fields[key].default]):
            raise ValueError(
                f"reward.terms takes the place of reward.{set_too[0]}: give the weight in reward.terms alone"
            )
        return self


COLDEST = 0.01  # vLLM's SamplingParams raises lower temperatures to this one


class SamplingSection(Section):
    temperature: NotNegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: off
    max_tokens: PositiveInt = 1024

    @property
    def tempered(self) -> bool:
        """Whether log-probs of the raw softmax are not those of what is sampled."""
        return self.temperature != 1.0

    def check_for_rl(self) -> None:
        """ValueError when the trainer cannot reproduce the distribution that responses are drawn from.

        The policy gradient needs the log-probs of that distribution: a temperature is one division on both sides, but
        the tokens that top_p and top_k cut off differ from weights to weights, and have no log-prob at all.
        """
        if self.temperature <= 0:
            raise ValueError(
                f"sampling.temperature is {self.temperature}: RL learns from the differences between drawn samples, "
                "and greedy decoding draws none. Set it above 0 (1.0 is usual)"
            )
        if self.temperature < COLDEST:
            raise ValueError(
                f"sampling.temperature is {self.temperature:g}: vLLM samples at {COLDEST:g} instead of anything "
                f"lower, and the trainer would compute with {self.temperature:g}. Set it to {COLDEST:g} or more (1.0 "
                "is usual)"
            )
        cuts = {"top_p": (self.top_p, self.top_p < 1, "1.0"), "top_k": (self.top_k, self.top_k > 0, "0")}
        for name, (value, cut, off) in cuts.items():
            if cut:
                raise ValueError(
                    f"sampling.{name} is {value}: RL needs the log-probs of the distribution that was sampled from, "
                    f"and the trainer's knows no cut, so the gradient would be biased. Set sampling.{name} = {off}; "
                    "sampling.temperature is supported"
                )


class HealthSection(Section):
    """When the learning signal counts as gone, and what happens then; docs/algorithm.md."""

    # when a cause has lasted `patience` steps. stop: save, end the run; rollback: go on from the last good checkpoint
    policy: Literal["warn", "stop", "rollback"] = "warn"
    patience: PositiveInt = 5
    rollback_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the learning rate, at each rollback
    max_rollbacks: PositiveInt = 2  # of the whole run; one more alarm ends it
    share: Annotated[float, Field(gt=0.5, le=1)] = 0.98  # of responses without answer, cut off, or with one answer
    one_sided_share: Annotated[float, Field(gt=0.5, le=1)] = 0.95  # of all |advantage|, on one side of 0
    min_reward_std: NotNegative = 1e-3  # of the returns
    min_entropy: NotNegative = 1e-4  # nats
    max_fall: Annotated[float, Field(gt=0, le=1)] = 0.1  # of the share of right samples, below its best


class AlgorithmSection(Section):
    """StableReinforce. Defaults are the paper's; `docs/algorithm.md` lists where the released code differs.

    `method` changes the defaults of other keys, `config.methods`.
    """

    method: Method = "stable_reinforce"
    loss: Literal["ppo", "gspo", "cispo", "sapo"] = "ppo"  # how the ratio enters, `algorithm.policy_loss`
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    advantage_estimator: Literal["returns", "gae"] = "returns"  # gae: a critic is trained beside the policy, [critic]
    gae_lambda: Fraction = 1.0  # of gae: 1 trusts what was earned, 0 what the critic expects after one token
    kl_coefficient: NotNegative = 0.0  # KL to the reference inside the reward
    kl_loss_coefficient: NotNegative = 0.0  # KL to the reference as a term of the loss
    kl_loss_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_loss_bound: NotNegative = 10.0  # of k3: nats per token above which it stops pulling; 0: none
    samples_per_prompt: PositiveInt = 1
    baseline: Literal["none", "group_mean", "leave_one_out"] = "none"
    group_normalize: bool = False  # GRPO: divide by the group's standard deviation
    # GDPO: each term of the reward is normalised on its own (in its group; without a baseline in the batch), then added
    normalize_terms: bool = False
    overlong_buffer: Fraction = 0.0  # DAPO: the last share of sampling.max_tokens in which length costs; 0: none
    overlong_weight: NotNegative = 1.0  # what a response of sampling.max_tokens tokens pays
    normalize: Literal["global", "none"] = "global"
    filter: Literal["paper", "released_code", "clamp", "none"] = "paper"
    filter_sigma: Positive = 3.0
    preclip: bool = True
    preclip_min: Positive = 1e-3
    preclip_max: Positive = 1e3
    clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2  # 1: no lower bound
    clip_high: Positive = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    sapo_positive_temperature: Positive = 1.0  # of SAPO's gate, by the sign of the advantage
    sapo_negative_temperature: Positive = 1.05
    entropy_coefficient: NotNegative = 0.0
    mismatch_alarm: Positive = 0.1  # mean |log-prob gap| to the sampler above which a step warns
    mismatch_threshold: Positive = 0.5  # nats; a token with a larger gap counts as beyond
    mismatch_share_alarm: Fraction = 0.01  # share of tokens beyond mismatch_threshold above which a step warns
    # of the ratio: "sampler" saves the trainer's pass over the batch before the update, where both are the same
    old_log_probs: Literal["trainer", "sampler"] = "trainer"
    truncated_importance_sampling: Positive | None = None
    aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = "sequence_mean"
    constant_length: PositiveInt = 1024
    skip_idle_sequences: bool = True  # an update leaves out responses without any advantage; same gradient
    fused_loss: bool = True  # the LM head forms the loss; false: plain torch behind its log-probs

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the initial policy has to be kept."""
        return self.kl_coefficient > 0 or self.kl_loss_coefficient > 0

    @property
    def needs_critic(self) -> bool:
        """Whether a second model, which values every response token, is trained beside the policy."""
        return self.advantage_estimator == "gae"

    @property
    def fuses_loss(self) -> bool:
        """Whether the LM head forms the loss: its kernels know "ppo"."""
        return self.fused_loss and self.loss == "ppo"

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, given: Any) -> Any:
        return with_defaults(given, "algorithm", given.get("method")) if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _bounds(self) -> AlgorithmSection:
        if not self.preclip_min < 1.0 < self.preclip_max:
            raise ValueError(f"preclip_min {self.preclip_min} and preclip_max {self.preclip_max} must enclose 1")
        if self.dual_clip is not None and self.loss in ("cispo", "sapo"):
            raise ValueError(
                f"dual_clip {self.dual_clip} bounds the ratio of a clipped loss, and loss is {self.loss!r}: "
                "remove dual_clip"
            )
        if self.group_normalize and self.baseline == "none":
            raise ValueError("group_normalize divides by a group's deviation: set baseline to 'group_mean' with it")
        if self.needs_critic and self.baseline != "none":
            raise ValueError(
                f"baseline {self.baseline!r} compares samples with each other, and advantage_estimator 'gae' with what "
                "a critic expects: set baseline to 'none', or advantage_estimator to 'returns'"
            )
        if not self.needs_critic and self.gae_lambda != 1.0:
            raise ValueError(
                f"gae_lambda {self.gae_lambda} means nothing to advantage_estimator 'returns': remove it, or set the "
                "estimator to 'gae'"
            )
        return self


class CriticSection(Section):
    """The second model of `algorithm.advantage_estimator = "gae"`: it values every token of a response."""

    path: Path | None = None  # folder that it begins with; None: model.path's weights with a new scalar head
    score_layers: Literal[1, 2] | None = None  # of a new scalar head: 1 linear, 2 with a hidden layer and ReLU
    lr: Annotated[float, Field(gt=0, le=1)] | None = None  # None: optimizer.lr; the rest is that of [optimizer]
    value_clip: NotNegative = 0.2  # by which a value may leave that before the update, in the loss; 0: no clip
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # first steps, in which the critic alone is trained

    def check(self, algorithm: AlgorithmSection, rl: RlSection) -> None:
        """ValueError where a key is set and there is no critic, or where the policy would never be trained."""
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if changed and not algorithm.needs_critic:
            raise ValueError(
                f"critic.{changed[0]} {getattr(self, changed[0])} means nothing without a critic: remove it, or set "
                "algorithm.method to 'ppo' (algorithm.advantage_estimator to 'gae')"
            )
        if self.warmup_steps >= rl.steps:
            raise ValueError(
                f"critic.warmup_steps {self.warmup_steps} leaves none of the {rl.steps} steps (rl.steps) to the "
                "policy: lower it"
            )
