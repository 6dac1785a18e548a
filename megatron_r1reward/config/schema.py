"""The run file: one section per concern, frozen, unknown keys refused.

Every default is written into the run directory's `config.toml`; the reasons stand beside the fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_r1reward.config.data_section import DataSection
from megatron_r1reward.config.methods import SECTIONS, with_defaults
from megatron_r1reward.config.rl_sections import (
    AlgorithmSection,
    AsynchronySection,
    CriticSection,
    HealthSection,
    PromptSection,
    RewardModelSection,
    RewardSection,
    RlSection,
    SamplingSection,
    SftSection,
)
from megatron_r1reward.config.section import Fraction, NotNegative, Positive, PositiveInt, Section
from megatron_r1reward.config.server_sections import JudgeSection, ServerSection


class RunSection(Section):
    output_dir: Path
    seed: Annotated[int, Field(ge=0)] = 0
    local_ranks: PositiveInt = 1  # trainer ranks started on this machine where neither torchrun nor Slurm did
    num_threads: PositiveInt | None = None  # intra-op threads of one trainer rank; None: leave torch's default


class MoeSection(Section):
    """Switches of mixture-of-experts models; dense models ignore them. The router always computes in float32."""

    load_balancing: Literal["none", "aux_loss"] = "none"  # aux_loss: Switch Transformer's, over each micro-batch
    aux_loss_coefficient: NotNegative = 1e-3  # used with load_balancing = "aux_loss"
    z_loss_coefficient: NotNegative = 0.0  # 0: off


class ModelSection(Section):
    path: Path  # HF checkpoint folder: config.json, safetensors, tokenizer, processor
    precision: Literal["fp32", "bf16"] = "bf16"
    freeze_vision: bool = False  # tower and merger
    freeze_vision_tower: bool = False
    freeze_merger: bool = False
    freeze_language: bool = False

    @model_validator(mode="after")
    def _something_trains(self) -> ModelSection:
        if self.freeze_language and (self.freeze_vision or (self.freeze_vision_tower and self.freeze_merger)):
            raise ValueError("freeze_language and the frozen vision parts leave nothing to train: unfreeze one")
        return self


class ParallelSection(Section):
    """The layout of one model replica and how replicas communicate; docs/parallelism.md."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt = 1  # model chunks per stage; above 1: interleaved schedule
    context_parallel_size: PositiveInt = 1
    context_parallel_comm: Literal["p2p", "all_gather", "a2a"] = "p2p"  # Transformer Engine only; local: all-gather
    expert_model_parallel_size: PositiveInt = 1  # mixture of experts: ranks that share the experts of a layer
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    ddp_bucket_size: PositiveInt | None = None  # parameters per communication bucket; None: megatron-core's rule
    vision: Literal["tensor_parallel", "image_sharded"] = "tensor_parallel"  # image_sharded: over TP x CP ranks
    vision_placement: Literal["first_stage", "balanced", "own_stage"] = "first_stage"  # under pipeline parallelism
    image_token_share: Fraction = 0.5  # of all tokens; weighs the tower for vision_placement "balanced"
    recompute: Literal["none", "selective", "full"] = "none"  # activations; selective: core attention only
    recompute_num_layers: PositiveInt = 1  # full: layers per checkpointed group
    recompute_vision: bool = False  # the same inside the vision tower (always full there)

    @property
    def expert_tensor_parallel_size(self) -> int:
        """Ranks that cut each expert. Under expert parallelism experts stay whole. Without it they are cut like every
        other layer: megatron-core 0.16.1 would not sum the gradients of experts that are whole on every tensor-parallel
        rank."""
        return self.tensor_model_parallel_size if self.expert_model_parallel_size == 1 else 1

    @model_validator(mode="after")
    def _combinations(self) -> ParallelSection:
        if self.virtual_pipeline_model_parallel_size > 1 and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"virtual_pipeline_model_parallel_size {self.virtual_pipeline_model_parallel_size} interleaves "
                "pipeline stages, but pipeline_model_parallel_size is 1: set it to at least 2"
            )
        if self.vision_placement != "first_stage" and self.pipeline_model_parallel_size == 1:
            raise ValueError(
                f"vision_placement {self.vision_placement!r} moves layers between pipeline stages, but "
                "pipeline_model_parallel_size is 1: set it to at least 2, or use 'first_stage'"
            )
        if self.overlap_param_gather and not (self.overlap_grad_reduce and self.use_distributed_optimizer):
            raise ValueError(
                "overlap_param_gather needs overlap_grad_reduce and use_distributed_optimizer: set both to true"
            )
        return self


class PrecisionSection(Section):
    """Layer implementation, FP8 and reproducibility; docs/fp8.md. The base precision is model.precision."""

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    # Of the LM head and the policy loss; triton_row and cuda_cluster form the loss of an update only. docs/kernels.md
    kernels: Literal["auto", "torch", "triton", "triton_row", "cuda_cluster"] = "auto"
    logits: Literal["fp32", "model"] = "fp32"  # model: rounded to model.precision before the softmax, as vLLM does
    fp8: Literal["hybrid", "e4m3"] | None = None  # hybrid: e4m3 forward, e5m2 gradients; vision stays in bf16
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    fp8_param_gather: bool = False  # keep and all-gather parameters in FP8
    fp8_margin: Annotated[int, Field(ge=0)] = 0  # delayed: head room in powers of two
    fp8_amax_history_len: PositiveInt = 1024  # delayed
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"  # delayed
    first_last_layers_bf16: bool = False
    layers_at_start_in_bf16: Annotated[int, Field(ge=0)] = 1
    layers_at_end_in_bf16: Annotated[int, Field(ge=0)] = 1
    deterministic: bool = False  # bitwise repeatable steps, slower


class ProfileSection(Section):
    """Profile some optimizer steps of the stage; off by default."""

    start_step: PositiveInt | None = None  # the first profiled step, counted from 1; None: no profile
    steps: PositiveInt = 1
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    tool: Literal["torch", "nsys"] = "torch"  # torch: Chrome traces in <output_dir>/profile; nsys: cudaProfilerStart


class OptimizerSection(Section):
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-6
    min_lr_ratio: Fraction = 0.1  # the cosine ends at min_lr_ratio * lr
    warmup_fraction: Fraction = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    clip_grad: NotNegative = 1.0
    max_skipped_steps: PositiveInt = 20  # consecutive steps with a non-finite gradient before the run fails


class AnnotateSection(Section):
    attempts: PositiveInt = 3
    max_rows: PositiveInt | None = None  # annotate a sample of data.train, drawn by run.seed and id; None: all
    url: str | None = None  # OpenAI-compatible endpoint, e.g. "https://host/v1"; None: serve model.path here
    model: str = "policy"  # its name at the endpoint
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key of a remote endpoint
    concurrency: PositiveInt = 64
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None  # rate limit of the endpoint; None: none
    budget_tokens: PositiveInt | None = None  # prompt and completion, all calls together; then the rest is left
    budget_cost: Annotated[float, Field(gt=0)] | None = None  # the same in money, by these prices
    prompt_price: Annotated[float, Field(ge=0)] = 0.0  # of a million tokens
    completion_price: Annotated[float, Field(ge=0)] = 0.0


class EvaluationSection(Section):
    data: Path | None = None
    image_root: Path | None = None  # as in [data]
    max_pairs: PositiveInt | None = None  # a sample of the pairs, drawn by run.seed and id; None: all
    samples: PositiveInt = 15  # K of voting@K
    voting: tuple[PositiveInt, ...] = (1, 5, 15)
    shuffled_images_control: bool = False
    greedy: bool = True  # once more at temperature 0, one response per pair and order
    # Wrong against wrong, near-equal and identical responses, so many of each, made of the data; 0: none
    extra_pairs: Annotated[int, Field(ge=0)] = 100
    transcripts: Annotated[int, Field(ge=0)] = 6
    # Votes without those whose reasoning [judge] does not find to support them
    judge_filtered_votes: bool = False


class ServeSection(Section):
    """The released remote-reward protocol (`r1reward serve-labels`), and the model's service on a cluster
    (`r1reward launch serve`, slurm/serve.sh), which alone has what stands below `allow_anonymous`."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 20240  # the port that the original code base expects; 0: any
    token_variable: str = "R1REWARD_SERVE_TOKEN"  # environment variable with the bearer token that clients must send
    allow_anonymous: bool = False  # serve a network address without a token: the original client cannot send one
    concurrency: PositiveInt = 64  # requests in progress; more hear 429
    image_roots: tuple[Path, ...] = ()  # folders that image paths in requests may be in
    cohort_size: Annotated[int, Field(ge=2)] = 8  # samples per prompt of trainers that send one at a time
    cohort_deadline_s: Positive = 30.0  # that the first of them waits for the others
    on_failure: Literal["raise", "neutral"] = "raise"  # samples without a reward


class CheckpointSection(Section):
    save_every: PositiveInt = 25
    async_save: bool = False  # write in the background; costs the memory of what training changes meanwhile
    keep_last: PositiveInt = 2
    keep_best: Annotated[int, Field(ge=0)] = 0  # so many with the best held-out accuracy (rl.heldout_every) besides
    keep_every: PositiveInt | None = None  # steps; checkpoints of multiples of it are never removed
    resume: bool = True
    same_data: bool = True  # refuse to resume on other data or in another order: the next step would not be the same
    same_models: bool = True  # likewise with another judge, reference policy, tokenizer or chat template
    init_from: Path | None = None  # distributed checkpoint with the first weights; None: model.path's safetensors


class MonitorSection(Section):
    tensorboard: bool = True
    wandb_project: str | None = None
    mlflow_experiment: str | None = None
    console_every: PositiveInt = 1


class ClusterSection(Section):
    """Who runs where, and how long it may be silent, when `r1reward launch` starts a stage's components."""

    # split: trainer and servers on different GPUs; colocated: rollout servers on the trainer's GPUs
    layout: Literal["split", "colocated"] = "split"
    # colocated: 1 keeps sleeping servers' weights in host memory, 2 drops them
    sleep_level: Literal[1, 2] = 1
    trainer_nodes: PositiveInt | None = None  # None: all nodes of the job that the servers leave free
    ranks_per_node: PositiveInt | None = None  # None: one per GPU of the trainer; without GPUs run.local_ranks
    cpus_per_rank: PositiveInt | None = None  # None: the node's cores shared by its GPUs; without GPUs 1
    cpus_per_server: PositiveInt | None = None  # None: as above; without GPUs the server's num_threads
    # Heterogeneous job only: the group of the job (0, 1, ...) that each kind of component runs on.
    trainer_het_group: Annotated[int, Field(ge=0)] = 0
    rollout_het_group: Annotated[int, Field(ge=0)] = 0
    judge_het_group: Annotated[int, Field(ge=0)] = 0
    shared_judge: Path | None = None  # run directory of a judge job (slurm/judge.sh): its servers are used
    stall_timeout_s: Positive = 1800.0  # no progress for so long (or 10 steps) is a failure
    grace_s: Positive = 30.0  # from "please end" to SIGKILL
    walltime_margin_s: NotNegative = 120.0  # kept free before the time limit, after the save
    requeue: bool = True  # under Slurm: ask for another turn after a save on request; false: only exit with 75
    container_image: str | None = None  # pyxis: run every component in this image; None: on the node itself
    container_mounts: tuple[str, ...] = ()  # "source:target[:flags]", besides working and run directory
    container_python: str = "python3"  # the interpreter in the image that has this package
    srun_args: tuple[str, ...] = ()  # further arguments of every srun, e.g. "--mpi=pmix"


class PlanSection(Section):
    """The machines that a run is planned for, and what the planner assumes of data and speed. Nothing else reads it."""

    model: str | None = None  # shipped configuration that stands for model.path while that folder does not exist
    nodes: PositiveInt = 1
    gpus_per_node: PositiveInt = 8
    device: Literal["a100", "h100", "h800", "h200", "b200", "l40s", "cpu"] = "h100"
    memory_gib: Positive | None = None  # usable memory of one device; None: the device's own
    network_gbit: Positive = 400.0  # per device, to other nodes, Gbit/s
    text_tokens: PositiveInt = 1200  # mean prompt without images
    images_per_prompt: Annotated[int, Field(ge=0)] = 1
    image_pixels: PositiveInt | None = None  # mean size of an image; None: data.max_pixels
    response_tokens: PositiveInt = 600  # mean; the paper's policy settles near 600
    longest_response: PositiveInt = 2048  # SFT: of the data; nothing in the run file bounds it, and a row is never cut
    compute_efficiency: Annotated[float, Field(gt=0, le=1)] | None = None  # of peak, inside layers; None: the device's


class RunConfig(Section):
    """One stage on one machine or cluster."""

    run: RunSection
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    moe: MoeSection = MoeSection()
    precision: PrecisionSection = PrecisionSection()
    profile: ProfileSection = ProfileSection()
    data: DataSection
    prompt: PromptSection = PromptSection()
    optimizer: OptimizerSection = OptimizerSection()
    sft: SftSection = SftSection()
    reward_model: RewardModelSection = RewardModelSection()
    rl: RlSection = RlSection()
    asynchrony: AsynchronySection = AsynchronySection()
    algorithm: AlgorithmSection = AlgorithmSection()
    critic: CriticSection = CriticSection()
    health: HealthSection = HealthSection()
    reward: RewardSection = RewardSection()
    sampling: SamplingSection = SamplingSection()
    rollout: ServerSection = ServerSection()
    judge: JudgeSection = JudgeSection()
    annotate: AnnotateSection = AnnotateSection()
    evaluation: EvaluationSection = EvaluationSection()
    serve: ServeSection = ServeSection()
    checkpoint: CheckpointSection = CheckpointSection()
    monitor: MonitorSection = MonitorSection()
    cluster: ClusterSection = ClusterSection()
    plan: PlanSection = PlanSection()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        algorithm = given.get("algorithm", {})
        method = algorithm.get("method") if isinstance(algorithm, dict) else getattr(algorithm, "method", None)
        sections = {name: with_defaults(given.get(name, {}), name, method) for name in SECTIONS - {"algorithm"}}
        return given | {name: section for name, section in sections.items() if section}

    @property
    def group_size(self) -> int:
        """Samples about a pair in a step of `rl`, which are compared with each other."""
        return self.algorithm.samples_per_prompt * self.rl.orders

    @property
    def response_order(self) -> str:
        """In which `rl` shows the two responses, for checkpoints and model cards."""
        return {"both_orders": "both", "pointwise": "one at a time"}.get(self.rl.pairing, self.data.swap)

    @model_validator(mode="after")
    def _samples_can_be_trained_on(self) -> RunConfig:
        mode = self.asynchrony.mode
        if self.algorithm.baseline != "none" and self.group_size == 1:
            raise ValueError(
                f"algorithm.baseline {self.algorithm.baseline!r} compares samples of one prompt: set "
                "algorithm.samples_per_prompt > 1, or rl.pairing to 'both_orders'"
            )
        if self.rl.dynamic_sampling_rounds and self.group_size == 1:
            raise ValueError(
                "rl.dynamic_sampling_rounds looks for prompts whose samples are partly right, and "
                "algorithm.samples_per_prompt is 1: set it above 1"
            )
        if self.reward.rewards_agreement and self.rl.pairing != "both_orders":
            raise ValueError(
                "the reward's term 'agreement' compares the two orders of a pair: set rl.pairing to 'both_orders'"
            )
        if self.rl.orders == 2 and self.data.swap != "random":
            both = f"rl.pairing {self.rl.pairing!r} shows both"
            raise ValueError(f"data.swap {self.data.swap!r} shows one order, and {both}: remove one")
        if self.rl.pairing == "pointwise":
            self._check_pointwise()
        if mode != "synchronous" and self.algorithm.truncated_importance_sampling is None:
            raise ValueError(
                f"asynchrony.mode {mode!r} trains on samples of older weights, which must be corrected for: set "
                "algorithm.truncated_importance_sampling (2.0 is usual)"
            )
        if mode != "synchronous" and self.cluster.layout == "colocated":
            raise ValueError(
                f"asynchrony.mode {mode!r} samples while the trainer works, but with cluster.layout 'colocated' both "
                "take turns on the same GPUs: set layout to 'split', or mode to 'synchronous'"
            )
        if self.algorithm.old_log_probs == "sampler":
            self._check_sampler_log_probs()
        self.critic.check(self.algorithm, self.rl)
        return self

    def _check_pointwise(self) -> None:
        """ValueError where something is set that ratings of single responses cannot give."""
        if self.prompt.kind == "generative":
            raise ValueError("rl.pairing 'pointwise' rates responses, prompt.kind 'generative' compares: remove one")
        if self.reward.use_judge:
            raise ValueError(
                "reward.use_judge asks whether a reasoning supports a verdict about a pair, and rl.pairing 'pointwise' "
                "samples ratings: set it to false"
            )
        compares = self.algorithm.baseline != "none" or self.rl.dynamic_sampling_rounds
        if self.algorithm.samples_per_prompt == 1 and compares:
            raise ValueError(
                "rl.pairing 'pointwise' with algorithm.samples_per_prompt 1: a pair's two ratings are both right or "
                "both wrong, which tells a baseline and dynamic sampling nothing: set it above 1"
            )

    def _check_sampler_log_probs(self) -> None:
        """ValueError unless the rollout servers' log-probs are those that the trainer would compute again."""
        engine = {"fp32": "float32", "bf16": "bfloat16"}[self.model.precision]
        rl, mode, dtype, quantization = self.rl, self.asynchrony.mode, self.rollout.dtype, self.rollout.quantization
        reasons = [
            (
                rl.train_batch_size != rl.rollout_batch_size,
                f"rl.train_batch_size {rl.train_batch_size} is below rl.rollout_batch_size {rl.rollout_batch_size}, so "
                "later optimizer steps of a batch train a policy that has changed: make them equal",
            ),
            (
                rl.epochs_per_batch > 1,
                f"rl.epochs_per_batch {rl.epochs_per_batch} trains a policy that has changed: set it to 1",
            ),
            (mode != "synchronous", f"asynchrony.mode {mode!r} samples by older weights: set it to 'synchronous'"),
            (
                self.critic.warmup_steps > 0,
                f"critic.warmup_steps {self.critic.warmup_steps} leaves out updates, which measure the gap to the "
                "servers then: set it to 0",
            ),
            (
                dtype != engine,
                f"rollout.dtype {dtype!r} is not model.precision {self.model.precision!r}: set it to {engine!r}",
            ),
            (quantization is not None, f"rollout.quantization {quantization!r} is another precision: remove it"),
            (self.precision.fp8 is not None, f"precision.fp8 {self.precision.fp8!r} is another precision: remove it"),
            (
                self.algorithm.truncated_importance_sampling is not None,
                "algorithm.truncated_importance_sampling would be 1 for all: remove it",
            ),
        ]
        for applies, reason in reasons:
            if applies:
                raise ValueError(
                    "algorithm.old_log_probs 'sampler' takes the rollout servers' log-probs for the trainer's, but "
                    f"{reason}, or set old_log_probs to 'trainer'"
                )
