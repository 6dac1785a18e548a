"""[rollout] and [judge]: the vLLM servers of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_r1reward.config.section import NotNegative, Positive, PositiveInt, Section


class VllmSection(Section):
    """One kind of vLLM server (rollout or judge). With `urls` set nothing is started: those servers are used."""

    urls: tuple[str, ...] = ()
    host: str = "127.0.0.1"  # address that started servers bind to; the network sees them only if this says so
    token_variable: str = "R1REWARD_SERVER_TOKEN"  # environment variable with the bearer token of the servers at `urls`
    model_path: Path | None = None  # judge: its HF folder; rollout: None means model.path
    count: PositiveInt = 1
    gpu_ids: tuple[int, ...] = ()  # GPUs shared out among started servers, tensor_parallel_size each; (): all visible
    tensor_parallel_size: PositiveInt = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_model_len: PositiveInt = 32_768
    max_num_seqs: PositiveInt = 64
    kv_cache_bytes: PositiveInt | None = None  # CPU: KV cache size; None: vLLM's default
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.7
    num_threads: PositiveInt = 1  # CPU servers: OpenMP threads of one server
    startup_timeout_s: Positive = 600.0
    request_timeout_s: Positive = 600.0
    max_concurrency: PositiveInt = 256  # requests in flight per server
    retries: Annotated[int, Field(ge=0)] = 3  # further attempts of a failed request, on another server if there is one
    backoff_s: Positive = 0.5  # first pause before a retry; doubles, with full jitter
    backoff_max_s: Positive = 10.0
    health_interval_s: Positive = 5.0
    health_timeout_s: Positive = 10.0
    health_failures: PositiveInt = 3  # missed health checks in a row after which a server counts as hung
    request_failures: PositiveInt = 3  # failed requests in a row after which a server is quarantined and probed
    probe_timeout_s: Positive = 60.0  # one-token completion before a server gets work again
    max_restarts: Annotated[int, Field(ge=0)] = 3  # restarts of one server without a success in between
    trust_remote_code: bool = False  # run Python code that comes with a checkpoint
    quantization: str | None = None  # vLLM's name of a method, e.g. "fp8"; None: the checkpoint's own
    extra_args: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _pauses(self) -> Self:
        if self.backoff_max_s < self.backoff_s:
            raise ValueError(
                f"backoff_max_s {self.backoff_max_s:g} is below backoff_s {self.backoff_s:g}, the first pause: raise it"
            )
        if any(number < 0 for number in self.gpu_ids):
            raise ValueError(f"gpu_ids {list(self.gpu_ids)} holds a negative number: GPUs are counted from 0")
        return self


class ServerSection(VllmSection):
    """Rollout servers: the trainer pushes weights to them."""

    sender_host: str = "127.0.0.1"  # address of the trainer's main rank as the servers see it, for weight pushes
    weight_transport: Literal["auto", "gloo", "nccl", "ipc"] = "auto"  # auto: nccl on GPUs, else gloo
    weight_bucket_bytes: PositiveInt = 64 << 20  # tensors travel in pieces of this size
    weights_once_per_host: bool = True  # gloo: of the workers on one machine one receives, for all of them
    push_timeout_s: Positive = 600.0  # one stage of a weight push, on the slowest server
    keep_snapshot: bool = True  # a host copy of the last pushed weights, so that a restarted server gets them at once


class JudgeSection(VllmSection):
    model: str | None = None  # name at the endpoint; None: the first that /v1/models lists
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key of a remote endpoint
    temperature: NotNegative = 0.0
    max_tokens: PositiveInt = 16
    request_timeout_s: Positive = 60.0  # one short reply
    reasoning_lines: PositiveInt = 3  # the last lines of the reasoning that the judge sees (released code: 3)
    cache: Path | None = None  # file of remembered verdicts; None: <run.output_dir>/judge-verdicts.sqlite
    max_calls_per_step: PositiveInt | None = None  # questions asked per step; the rest count as unknown. None: no limit
    breaker_failures: PositiveInt = 8  # questions in a row without a verdict after which the batch asks no more
    max_steps_without_judge: Annotated[int, Field(ge=0)] = 5  # steps that may go on with C = 0, then save and stop
