"""Operations, volumes and serving by hand."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest

from megatron_r1reward.config.schema import PlanSection, ServerSection
from megatron_r1reward.planner.catalog import find_model
from megatron_r1reward.planner.devices import DEVICES, find_device
from megatron_r1reward.planner.plan import make_plan
from megatron_r1reward.planner.planned_layout import Layout
from megatron_r1reward.planner.server_memory import decode_step, plan_server
from megatron_r1reward.planner.step_time import head_flops, language_flops, vision_flops, volumes
from megatron_r1reward.planner.workload import MicroBatch

SEVEN = find_model(Path("models/Qwen2.5-VL-7B-Instruct"))
TEXT, VISION = SEVEN.shape.text, SEVEN.shape.vision
BATCH = MicroBatch(name="x", tokens=8192, sequences=4, patches=10_240, responses=2400, longest=2048)


def test_language_operations_by_hand():
    products = 28 * (3584 * (3584 + 1024) + 3584 * 3584 + 3 * 3584 * 18_944)
    scores = 28 * 2 * 3584 * 2048
    found = language_flops(TEXT, range(28), tokens=8192, length=2048)
    biases = 28 * (3584 + 1024)  # added, but counted like the weights
    assert found == 8192 * (2 * (products + biases) + scores)


def test_vision_operations_by_hand():
    block = 2 * (4 * 1280**2 + 3 * 1280 * 3420)
    scores = 4 * 1280 * (4 * 2560 + 28 * 64)
    merger = 2 * (5120 * 5120 + 5120 * 3584) / 4
    assert vision_flops(VISION, patches=1, frame=2560) == 32 * block + scores + merger + 2 * 1176 * 1280


def test_the_head_runs_on_response_tokens_only():
    assert head_flops(SEVEN.shape, 600) == 2 * 600 * 152_064 * 3584


def test_tensor_parallel_volume_by_hand():
    layout = Layout(tp=4, sequence_parallel=True)
    found = volumes(SEVEN.shape, layout, BATCH, 2)
    assert found.tensor_parallel == 28 * 10 * 8192 * 3584 * 2 * 3 / 4
    assert found.context_parallel == found.pipeline == found.experts == found.data_parallel == 0


def test_data_parallel_volume_by_hand():
    found = volumes(SEVEN.shape, Layout(dp=4), BATCH, 2)
    assert found.data_parallel == 8_292_166_656 * (4 + 2) * 3 / 4
    assert found.per_micro_batch == 0


def test_context_pipeline_and_expert_volumes_appear_with_their_sizes():
    assert volumes(SEVEN.shape, Layout(cp=2), BATCH, 2).context_parallel == 28 * 3 * 4096 * 1024 * 2
    assert volumes(SEVEN.shape, Layout(pp=2), BATCH, 2).pipeline == 2 * 8192 * 3584 * 2
    moe = find_model(Path("Qwen3-VL-30B-A3B-Instruct")).shape
    found = volumes(moe, Layout(tp=2, sequence_parallel=True, ep=4, dp=2), BATCH, 2)
    assert found.experts == 48 * 4 * 8192 / 2 * 2048 * 2 * 8 * 3 / 4
    # tensor parallelism is left with the attention
    assert found.tensor_parallel == 48 * 5 * 8192 * 2048 * 2 / 2


def test_a_servers_cache_by_hand():
    section = ServerSection(gpu_memory_utilization=0.85)
    server = plan_server("rollout", section, SEVEN, DEVICES["h100"], count=1)
    per_token = 2 * 4 * 128 * 28 * 2
    assert server.problem is None
    assert server.memory.weights == 2 * 8_292_166_656
    assert server.memory.cache_tokens == server.memory.cache // per_token


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        ("Qwen2.5-VL-7B-Instruct", {"tensor_parallel_size": 8}, "nearest legal size is 4"),
        ("Qwen2.5-VL-72B-Instruct", {"tensor_parallel_size": 1}, "gpu_memory_utilization"),
        ("Qwen2.5-VL-7B-Instruct", {"gpu_memory_utilization": 0.23}, "KV cache"),
    ],
)
def test_servers_that_could_not_start(model: str, change: dict[str, object], words: str):
    found = find_model(Path(model))
    server = plan_server("rollout", ServerSection(**change), found, DEVICES["h100"], count=1)
    assert server.problem is not None
    assert words in server.problem


def test_decoding_reads_weights_and_cache_once_per_step():
    device = DEVICES["h100"]
    alone = decode_step(ServerSection(), SEVEN, device, sequences=0, context=0)
    assert alone == pytest.approx(2 * 8_292_166_656 / (3.35e12 * 0.6) + device.decode_overhead_s)
    assert decode_step(ServerSection(), SEVEN, device, sequences=64, context=2000) > alone


def test_the_device_table_covers_the_run_files_choices():
    assert set(get_args(PlanSection.model_fields["device"].annotation)) == set(DEVICES)
    assert all(device.source for device in DEVICES.values())


def test_run_files_replace_memory_network_and_efficiency():
    device = find_device(PlanSection(device="h200", memory_gib=100, network_gbit=200, compute_efficiency=0.3))
    assert (device.memory_bytes, device.network_bytes, device.compute_efficiency) == (100 * 2**30, 25e9, 0.3)


def test_times_add_up_and_move_as_they_should(make_config):
    keys = {"parallel.tensor_model_parallel_size": 4, "rollout.count": 3, "parallel.recompute": "full"}
    plan = make_plan(make_config("Qwen2.5-VL-7B-Instruct", stage="rl", **keys), "rl")
    assert set(plan.time.phases) == {"generation", "log-probs", "optimizer steps", "weight push"}
    assert plan.time.seconds == pytest.approx(sum(plan.time.phases.values()))
    assert 0 < plan.time.update.mfu < plan.device.compute_efficiency
    kl = make_config("Qwen2.5-VL-7B-Instruct", stage="rl", **keys, **{"algorithm.kl_coefficient": 0.001})
    with_reference = make_plan(kl, "rl")
    assert with_reference.time.phases["log-probs"] == pytest.approx(2 * plan.time.phases["log-probs"])
    assert with_reference.peak.reference == plan.peak.parameters
    faster = make_plan(
        make_config("Qwen2.5-VL-7B-Instruct", stage="rl", **{**keys, "parallel.recompute": "none"}), "rl"
    )
    assert faster.time.phases["optimizer steps"] < plan.time.phases["optimizer steps"]
    assert asdict(faster.communication[0])["tensor_parallel"] < asdict(plan.communication[0])["tensor_parallel"]


@pytest.mark.parametrize("layers", [1, 2])
def test_a_critic_is_a_second_model_with_an_optimizer(make_config, layers):
    """Of the policy's size without its LM head: here not tied, so that is what it has less."""
    keys = {"parallel.tensor_model_parallel_size": 4, "rollout.count": 3, "parallel.recompute": "full"}
    plan = make_plan(make_config("Qwen2.5-VL-7B-Instruct", stage="rl", **keys), "rl")
    ppo = {"algorithm.method": "ppo", "critic.score_layers": layers}
    planned = make_plan(make_config("Qwen2.5-VL-7B-Instruct", stage="rl", **keys, **ppo), "rl")
    assert planned.parameters == plan.parameters, "what is pushed and exported is the policy"
    values = sum(plan.parameters.values())
    without_head = 1 - plan.parameters["head"] / values
    state = plan.peak.parameters + plan.peak.gradients + plan.peak.optimizer
    assert planned.peak.critic == pytest.approx(without_head * state, rel=0.01)
    assert planned.peak.total - plan.peak.total == planned.peak.critic
    assert plan.peak.critic == 0
    assert planned.peak.static - plan.peak.static == planned.peak.critic
    both = plan.time.phases["log-probs"] + plan.time.phases["optimizer steps"]
    assert 0.8 * both < planned.time.phases["critic"] < both
    larger = make_plan(
        make_config("Qwen2.5-VL-3B-Instruct", stage="rl", **keys, **ppo, **{"critic.path": "Qwen2.5-VL-7B-Instruct"}),
        "rl",
    )
    assert larger.peak.critic == planned.peak.critic
