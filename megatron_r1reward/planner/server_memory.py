"""Memory of a vLLM server and how fast it generates.

vLLM takes `gpu_memory_utilization` of a device: weights, working memory of its largest batch, and what is left becomes
KV cache. A server whose cache cannot hold one sequence of `max_model_len` refuses to start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_r1reward.config.server_sections import VllmSection
from megatron_r1reward.planner.catalog import Model
from megatron_r1reward.planner.devices import Device
from megatron_r1reward.planner.parameters import all_tensors, by_component
from megatron_r1reward.planner.step_time import sequence_flops
from megatron_r1reward.planner.workload import Workload

GIB = 2**30
CACHE_WIDTH = 2  # bytes per value of the KV cache
# Assumptions: a bf16 batch of vLLM's 8,192 default tokens through the widest layer, the encoder's profile run, graphs.
BATCHED_TOKENS = 8192
GRAPH_BYTES = 1.0 * GIB
SLEEPING_BYTES = 1.5 * GIB  # CUDA context and graphs that a sleeping server keeps


@dataclass(frozen=True, kw_only=True)
class ServerMemory:
    """Bytes of one device of a server, and what its cache holds."""

    weights: float
    working: float
    cache: float
    cache_tokens: int  # of the whole server
    reserved: float  # gpu_memory_utilization of the device

    def parts(self) -> dict[str, float]:
        return {"weights": self.weights, "working": self.working, "KV cache": self.cache}


@dataclass(frozen=True, kw_only=True)
class Server:
    kind: str  # "rollout" or "judge"
    model: Model
    count: int
    memory: ServerMemory
    problem: str | None


def plan_server(kind: str, section: VllmSection, model: Model, device: Device, *, count: int) -> Server:
    """Memory of one server of `section` and what keeps it from starting."""
    text, tp = model.shape.text, section.tensor_parallel_size
    width = 4 if section.dtype == "float32" else 2
    weights = sum(by_component(all_tensors(model.shape)).values()) * width / tp
    working = BATCHED_TOKENS * (2 * _widest(model) / tp + 4 * text.hidden) * width + GRAPH_BYTES
    reserved = section.gpu_memory_utilization * device.memory_bytes
    cache = section.kv_cache_bytes or max(reserved - weights - working, 0.0)
    per_token = text.key_value / min(tp, text.groups) * text.layers * CACHE_WIDTH
    memory = ServerMemory(
        weights=weights,
        working=working,
        cache=cache,
        cache_tokens=int(cache // per_token),
        reserved=reserved,
    )
    return Server(
        kind=kind, model=model, count=count, memory=memory, problem=_problem(kind, section, model, device, memory)
    )


def _widest(model: Model) -> int:
    text = model.shape.text
    return text.experts.ffn * text.experts.top_k if text.experts else text.ffn


def _problem(kind: str, section: VllmSection, model: Model, device: Device, memory: ServerMemory) -> str | None:
    text, tp = model.shape.text, section.tensor_parallel_size
    if text.heads % tp or model.shape.vision.heads % tp:
        legal = next(n for n in range(tp, 0, -1) if text.heads % n == 0 and model.shape.vision.heads % n == 0)
        return (
            f"{kind}.tensor_parallel_size {tp} does not divide the {text.heads} heads (vision: "
            f"{model.shape.vision.heads}) of {model.name}: the nearest legal size is {legal}"
        )
    if memory.weights + memory.working > memory.reserved:
        return (
            f"a {kind} server of {model.name} needs {(memory.weights + memory.working) / GIB:.1f} GiB of each device, "
            f"{kind}.gpu_memory_utilization {section.gpu_memory_utilization} gives it {memory.reserved / GIB:.1f}: "
            f"set {kind}.tensor_parallel_size to {2 * tp} or raise the utilization"
        )
    if memory.cache_tokens < section.max_model_len:
        return (
            f"the KV cache of a {kind} server of {model.name} holds {memory.cache_tokens} tokens, {kind}.max_model_len "
            f"is {section.max_model_len}: lower it, or set {kind}.tensor_parallel_size to {2 * tp}"
        )
    return None


def decode_step(section: VllmSection, model: Model, device: Device, *, sequences: float, context: float) -> float:
    """Seconds of one decoding step of `sequences` sequences: weights and cache are read once."""
    text, tp = model.shape.text, section.tensor_parallel_size
    weights = sum(by_component(all_tensors(model.shape)).values()) * 2 / tp
    cache = sequences * context * text.key_value / min(tp, text.groups) * text.layers * CACHE_WIDTH
    return (weights + cache) / (device.memory_rate * device.bandwidth_efficiency) + device.decode_overhead_s


def generation_seconds(
    section: VllmSection,
    server: Server,
    device: Device,
    workload: Workload,
    *,
    prompts: int,
    samples: int,
    longest_response: int,
) -> float:
    """Seconds until `prompts` x `samples` responses are there, prompts spread evenly over the servers.

    Prefill runs at a fixed share of peak, once per prompt (samples share it through the prefix cache). Decoding runs
    as many sequences at once as the cache and max_num_seqs allow, for at least the longest response.
    """
    count = max(server.count, 1)
    shape = server.model.shape
    per_prompt = sequence_flops(
        shape,
        tokens=workload.prompt_tokens,
        patches=workload.patches,
        frame=workload.frame_patches,
        responses=1,
    )
    rate = device.bf16_flops * device.prefill_efficiency * section.tensor_parallel_size
    prefill = math.ceil(prompts / count) * per_prompt / rate
    context = workload.prompt_tokens + workload.response_tokens / 2
    requests = math.ceil(prompts * samples / count)
    at_once = max(1, min(requests, section.max_num_seqs, server.memory.cache_tokens / context))
    steps = max(requests * workload.response_tokens / at_once, longest_response)
    busy = min(at_once, requests * workload.response_tokens / steps)
    return prefill + steps * decode_step(section, server.model, device, sequences=busy, context=context)
