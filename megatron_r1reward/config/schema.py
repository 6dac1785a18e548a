"""The run file: one section per concern, frozen, unknown keys refused.

Every default is written into the run directory's `config.toml`; the reasons stand beside the fields.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSection(Section):
    output_dir: Path
    seed: int = 0
    local_ranks: PositiveInt = 1  # trainer ranks started on this machine where neither torchrun nor Slurm did
    num_threads: PositiveInt | None = None  # intra-op threads of one trainer rank; None: leave torch's default


class ModelSection(Section):
    path: Path  # HF checkpoint folder: config.json, safetensors, tokenizer, processor
    precision: Literal["fp32", "bf16"] = "bf16"
    freeze_vision: bool = False


class ParallelSection(Section):
    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True


class DataSection(Section):
    train: Path
    select: Path | None = None  # JSON list of ids to train on, e.g. the hard set that `r1reward annotate` writes
    image_root: Path | None = None  # relative image paths are resolved against it; None: the JSONL's folder
    max_pixels: PositiveInt = 501_760  # 640 * 28 * 28, the published training setting
    min_pixels: PositiveInt = 3_136  # 4 * 28 * 28
    token_budget: PositiveInt = 8192  # tokens of one packed micro-batch
    swap: Literal["random", "never", "always"] = "random"  # order of the two responses, redrawn every epoch
    max_prompt_tokens: PositiveInt = 20_480


class OptimizerSection(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    min_lr_ratio: Fraction = 0.1  # the cosine ends at min_lr_ratio * lr
    warmup_fraction: Fraction = 0.03
    schedule: Literal["cosine", "constant"] = "cosine"
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: float = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Annotated[float, Field(ge=0)] = 1.0


class SftSection(Section):
    steps: PositiveInt | None = None  # None: one pass per epoch
    epochs: PositiveInt = 1
    global_batch_size: PositiveInt = 256


class AlgorithmSection(Section):
    """StableReinforce. Defaults are the paper's; `docs/algorithm.md` lists where the released code differs."""

    gamma: Fraction = 1.0
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
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
    truncated_importance_sampling: Annotated[float, Field(gt=0)] | None = None
    aggregation: Literal["sequence_mean", "token_mean", "constant_length"] = "sequence_mean"
    constant_length: PositiveInt = 1024

    @model_validator(mode="after")
    def _bounds(self) -> AlgorithmSection:
        if not self.preclip_min < 1.0 < self.preclip_max:
            raise ValueError(f"preclip_min {self.preclip_min} and preclip_max {self.preclip_max} must enclose 1")
        if self.baseline != "none" and self.samples_per_prompt == 1:
            raise ValueError(f"baseline {self.baseline!r} compares samples of one prompt: set samples_per_prompt > 1")
        if self.group_normalize and self.baseline == "none":
            raise ValueError("group_normalize divides by a group's deviation: set baseline to 'group_mean' with it")
        return self


class RewardSection(Section):
    format_weight: float = 0.5
    consistency_weight: float = 0.5
    consistency_levels: Literal["paper", "released_code"] = "paper"  # {0, 1} or {-1, 0, 1}
    use_judge: bool = True


class RlSection(Section):
    steps: PositiveInt = 100  # rollout batches
    rollout_batch_size: PositiveInt = 256  # prompts per step
    train_batch_size: PositiveInt = 128  # prompts (times samples_per_prompt rollouts) per optimizer step
    heldout_every: PositiveInt | None = None  # steps between accuracy probes on evaluation.data; None: no probes
    heldout_pairs: PositiveInt = 128  # pairs of one probe, each asked once in both orders

    @model_validator(mode="after")
    def _divides(self) -> RlSection:
        if self.rollout_batch_size % self.train_batch_size:
            raise ValueError(
                f"rl.rollout_batch_size {self.rollout_batch_size} is not a multiple of "
                f"rl.train_batch_size {self.train_batch_size}: choose a divisor"
            )
        return self


class SamplingSection(Section):
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: PositiveInt = 1024


class ServerSection(Section):
    """One kind of vLLM server (rollout or judge). With `urls` set nothing is started: those servers are used."""

    urls: tuple[str, ...] = ()
    host: str = "127.0.0.1"  # address that started servers bind to; the network sees them only if this says so
    token_variable: str = "R1REWARD_SERVER_TOKEN"  # environment variable with the bearer token of the servers at `urls`
    model_path: Path | None = None  # judge: its HF folder; rollout: None means model.path
    count: PositiveInt = 1
    sender_host: str = "127.0.0.1"  # address of the trainer's main rank as the servers see it, for weight pushes
    weight_transport: Literal["auto", "gloo", "nccl", "ipc"] = "auto"  # auto: nccl on GPUs, else gloo
    weight_bucket_bytes: PositiveInt = 64 << 20  # tensors travel in pieces of this size
    push_timeout_s: Annotated[float, Field(gt=0)] = 600.0  # one stage of a weight push, on the slowest server
    keep_snapshot: bool = True  # a host copy of the last pushed weights, so that a restarted server gets them at once
    gpu_ids: tuple[int, ...] = ()  # GPUs shared out among started servers, tensor_parallel_size each; (): all visible
    tensor_parallel_size: PositiveInt = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_model_len: PositiveInt = 32_768
    max_num_seqs: PositiveInt = 64
    kv_cache_bytes: PositiveInt | None = None  # CPU: KV cache size; None: vLLM's default
    gpu_memory_utilization: Fraction = 0.7
    num_threads: PositiveInt = 1  # CPU servers: OpenMP threads of one server
    startup_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    request_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    max_concurrency: PositiveInt = 256  # requests in flight per server
    retries: Annotated[int, Field(ge=0)] = 3  # further attempts of a failed request, on another server if there is one
    backoff_s: Annotated[float, Field(gt=0)] = 0.5  # first pause before a retry; doubles, with full jitter
    backoff_max_s: Annotated[float, Field(gt=0)] = 10.0
    health_interval_s: Annotated[float, Field(gt=0)] = 5.0
    health_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    health_failures: PositiveInt = 3  # missed health checks in a row after which a server counts as hung
    request_failures: PositiveInt = 3  # failed requests in a row after which a server is quarantined and probed
    probe_timeout_s: Annotated[float, Field(gt=0)] = 60.0  # one-token completion before a server gets work again
    max_restarts: Annotated[int, Field(ge=0)] = 3  # restarts of one server without a success in between
    trust_remote_code: bool = False  # run Python code that comes with a checkpoint
    quantization: str | None = None  # vLLM's name of a method, e.g. "fp8"; None: the checkpoint's own
    extra_args: tuple[str, ...] = ()


class JudgeSection(ServerSection):
    model: str | None = None  # name at the endpoint; None: the first that /v1/models lists
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key of a remote endpoint
    temperature: Annotated[float, Field(ge=0)] = 0.0
    max_tokens: PositiveInt = 16
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0  # one short reply
    reasoning_lines: PositiveInt = 3  # the last lines of the reasoning that the judge sees (released code: 3)
    cache: Path | None = None  # file of remembered verdicts; None: <run.output_dir>/judge-verdicts.sqlite
    max_calls_per_step: PositiveInt | None = None  # questions asked per step; the rest count as unknown. None: no limit
    breaker_failures: PositiveInt = 8  # questions in a row without a verdict after which the batch asks no more
    max_steps_without_judge: Annotated[int, Field(ge=0)] = 5  # steps that may go on with C = 0, then save and stop


class AnnotateSection(Section):
    attempts: PositiveInt = 3
    max_rows: PositiveInt | None = None  # annotate only the first rows of data.train; None: all
    url: str | None = None  # OpenAI-compatible endpoint, e.g. "https://host/v1"; None: serve model.path here
    model: str = "policy"  # its name at the endpoint
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key of a remote endpoint
    concurrency: PositiveInt = 64


class EvaluationSection(Section):
    data: Path | None = None
    image_root: Path | None = None  # as in [data]
    max_pairs: PositiveInt | None = None
    samples: PositiveInt = 15  # K of voting@K
    voting: tuple[PositiveInt, ...] = (1, 5, 15)
    shuffled_images_control: bool = False
    transcripts: Annotated[int, Field(ge=0)] = 6


class ServeSection(Section):
    """The released remote-reward protocol (`r1reward serve`)."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 20240  # the port that the original code base expects; 0: any
    token_variable: str = "R1REWARD_SERVE_TOKEN"  # environment variable with the bearer token that clients must send
    allow_anonymous: bool = False  # serve a network address without a token: the original client cannot send one


class CheckpointSection(Section):
    save_every: PositiveInt = 25
    keep_last: PositiveInt = 2
    resume: bool = True


class MonitorSection(Section):
    tensorboard: bool = True
    wandb_project: str | None = None
    mlflow_experiment: str | None = None
    console_every: PositiveInt = 1


class RunConfig(Section):
    """One stage on one machine or cluster."""

    run: RunSection
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    sft: SftSection = SftSection()
    rl: RlSection = RlSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    reward: RewardSection = RewardSection()
    sampling: SamplingSection = SamplingSection()
    rollout: ServerSection = ServerSection()
    judge: JudgeSection = JudgeSection()
    annotate: AnnotateSection = AnnotateSection()
    evaluation: EvaluationSection = EvaluationSection()
    serve: ServeSection = ServeSection()
    checkpoint: CheckpointSection = CheckpointSection()
    monitor: MonitorSection = MonitorSection()
