"""The plan of one stage: memory of every component, communication, time, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1reward.cluster.placement import servers_of
from megatron_r1reward.config.schema import RunConfig
from megatron_r1reward.model_folder.shape import ModelShape
from megatron_r1reward.planner import planned_layout as layouts
from megatron_r1reward.planner import step_time
from megatron_r1reward.planner.catalog import Model, find_critic, find_model
from megatron_r1reward.planner.devices import Device, find_device
from megatron_r1reward.planner.memory import GIB, Numerics, StageMemory, trainer_memory, with_critic
from megatron_r1reward.planner.parameters import all_tensors, by_component
from megatron_r1reward.planner.planned_layout import Devices, Layout, Stage, planned_devices
from megatron_r1reward.planner.server_memory import SLEEPING_BYTES, Server, generation_seconds, plan_server
from megatron_r1reward.planner.step_time import Communication, volumes
from megatron_r1reward.planner.workload import Workload, describe

VISION = frozenset({"vision tower", "vision merger"})


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Predicted seconds of one step of the stage, by phase. MFU is that of the optimizer steps."""

    phases: dict[str, float]
    update: step_time.UpdateTime
    tokens: int  # prompt and response tokens trained on in one step

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`problems` is empty when the run fits; `notes` are what a reader should know besides."""

    stage: Stage
    model: Model
    device: Device
    devices: Devices
    layout: Layout
    workload: Workload
    parameters: dict[str, int]
    memory: tuple[StageMemory, ...]
    servers: tuple[Server, ...]
    communication: tuple[Communication, ...]
    push_bytes: float
    time: StepTime
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def peak(self) -> StageMemory:
        return max(self.memory, key=lambda stage: stage.total)


def stage_of(config: RunConfig) -> Stage:
    """The stage that a run file is for: "sft" where it has that section and no [rl].

    Raises:
        ValueError: it has both, or is one of a scalar reward model.
    """
    given = {"sft", "rl"} & config.model_fields_set
    if given == {"sft", "rl"}:
        raise ValueError("the run file has both [sft] and [rl]: say which with --stage")
    if not given and "reward_model" in config.model_fields_set:
        raise ValueError("a scalar reward model ([reward_model]) is not planned: --stage sft comes close from above")
    return "sft" if given == {"sft"} else "rl"


def frozen_components(config: RunConfig, names: set[str]) -> frozenset[str]:
    """Components without gradients."""
    model = config.model
    frozen: set[str] = set(VISION) if model.freeze_vision else set()
    if model.freeze_vision_tower:
        frozen.add("vision tower")
    if model.freeze_merger:
        frozen.add("vision merger")
    if model.freeze_language:
        frozen |= names - VISION
    return frozenset(frozen)


def has_fused_loss(config: RunConfig, stage: Stage) -> bool:
    """Whether the LM head forms the loss itself."""
    return stage == "rl" and config.algorithm.fuses_loss


def make_plan(config: RunConfig, stage: Stage) -> Plan:
    """Plan `stage` of a run.

    Raises:
        ValueError: the model is unknown, the components do not fit on the devices, the layout is illegal, or RL cannot
            use the sampling; the message holds the reason and the nearest legal choice.
    """
    if stage == "rl":
        config.sampling.check_for_rl()
    model = find_model(config.model.path, config.plan.model)
    device = find_device(config.plan)
    devices = planned_devices(config, stage)
    critic = find_critic(config) if stage == "rl" else None
    for shape in (model.shape, *([] if critic is None else [critic])):
        problem = layouts.check(shape, config.parallel, devices.trainer)
        if problem is not None:
            raise ValueError(problem)
    layout = layouts.trainer_layout(model.shape, config.parallel, devices.trainer)
    workload = describe(config, model.shape, layout, stage)
    if workload.sequences < layout.dp:
        name = "sft.global_batch_size" if stage == "sft" else "rl.train_batch_size"
        raise ValueError(
            f"{workload.sequences} sequences per optimizer step ({name}) leave some of the {layout.dp} data-parallel "
            f"ranks without any: raise it to {layout.dp} or use fewer devices"
        )
    numerics = _numerics(config)
    parameters = by_component(all_tensors(model.shape))
    frozen = frozen_components(config, set(parameters))
    memory = trainer_memory(
        model.shape,
        layout,
        numerics,
        workload,
        device,
        frozen=frozen,
        with_reference=stage == "rl" and config.algorithm.needs_reference,
        fused_loss=has_fused_loss(config, stage),
    )
    if critic is not None:
        beside = layouts.trainer_layout(critic, config.parallel, devices.trainer)
        of_critic = trainer_memory(critic, beside, numerics, workload, device, frozen=frozen & VISION)
        memory = with_critic(memory, of_critic)
    servers, notes = _servers(config, stage, model, device)
    return Plan(
        stage=stage,
        model=model,
        device=device,
        devices=devices,
        layout=layout,
        workload=workload,
        parameters=parameters,
        memory=tuple(memory),
        servers=servers,
        communication=tuple(
            volumes(model.shape, layout, workload.mean, numerics.width, stage=s) for s in range(layout.pp)
        ),
        push_bytes=float(sum(parameters.values()) * numerics.width) if stage == "rl" else 0.0,
        time=_time(config, stage, model, critic, layout, workload, device, numerics, servers),
        problems=tuple(_problems(config, memory, device, devices, servers)),
        notes=tuple(_notes(config, model, notes)),
    )


def _numerics(config: RunConfig) -> Numerics:
    width = 4 if config.model.precision == "fp32" else 2
    logits_width = 4 if config.precision.logits == "fp32" else width
    return Numerics(width=width, fused_norm=config.plan.device != "cpu", logits_width=logits_width)


def _servers(config: RunConfig, stage: Stage, model: Model, device: Device) -> tuple[tuple[Server, ...], list[str]]:
    counts, notes = servers_of(config, stage), []
    servers = []
    if stage == "rl" and counts["rollout"]:
        servers.append(plan_server("rollout", config.rollout, model, device, count=counts["rollout"]))
    if counts["judge"]:
        path = config.judge.model_path
        try:
            judge = find_model(path) if path is not None else None
        except ValueError:
            judge = None
        if judge is None:
            notes.append(f"the judge ({path}) is of no family known here: its memory is not planned")
        else:
            servers.append(plan_server("judge", config.judge, judge, device, count=counts["judge"]))
    return tuple(servers), notes


def _time(
    config: RunConfig,
    stage: Stage,
    model: Model,
    critic: ModelShape | None,
    layout: Layout,
    workload: Workload,
    device: Device,
    numerics: Numerics,
    servers: tuple[Server, ...],
) -> StepTime:
    node = config.plan.gpus_per_node
    update = step_time.update_time(
        model.shape,
        layout,
        workload,
        device,
        width=numerics.width,
        node=node,
        fused_loss=has_fused_loss(config, stage),
    )
    phases = {}
    rollout = next((server for server in servers if server.kind == "rollout"), None)
    if stage == "rl":
        passes = 1 + config.algorithm.needs_reference
        if rollout is not None:
            phases["generation"] = generation_seconds(
                config.rollout,
                rollout,
                device,
                workload,
                prompts=config.rl.rollout_batch_size,
                samples=config.algorithm.samples_per_prompt,
                longest_response=config.sampling.max_tokens,
            )
        phases["log-probs"] = passes * step_time.log_prob_seconds(
            model.shape, layout, workload, device, width=numerics.width, node=node
        )
    phases["optimizer steps"] = workload.optimizer_steps * update.seconds
    if critic is not None:
        beside = layouts.trainer_layout(critic, config.parallel, layout.world)
        of_one = step_time.update_time(critic, beside, workload, device, width=numerics.width, node=node)
        values = step_time.log_prob_seconds(critic, beside, workload, device, width=numerics.width, node=node)
        phases["critic"] = values + workload.optimizer_steps * of_one.seconds
    if rollout is not None:
        size = sum(by_component(all_tensors(model.shape)).values()) * numerics.width
        phases["weight push"] = step_time.push_seconds(size, device, one_node=config.plan.nodes == 1)
    tokens = workload.sequences * workload.optimizer_steps * workload.sequence_tokens
    return StepTime(phases=phases, update=update, tokens=tokens)


def _problems(
    config: RunConfig, memory: list[StageMemory], device: Device, devices: Devices, servers: tuple[Server, ...]
) -> list[str]:
    problems = []
    available = device.memory_bytes - (SLEEPING_BYTES if devices.colocated else 0.0)
    stage, peak = max(enumerate(memory), key=lambda pair: pair[1].total)
    if peak.total > available:
        name, size = max(peak.parts().items(), key=lambda part: part[1])
        where = f" (pipeline stage {stage})" if len(memory) > 1 else ""
        problems.append(
            f"a trainer rank{where} needs {peak.total / GIB:.1f} GiB, {device.name} has {available / GIB:.1f}"
            f"{' beside a sleeping server' if devices.colocated else ''}; most of it: "
            f"{name.replace('_', ' ')}, {size / GIB:.1f} GiB"
        )
    problems += [server.problem for server in servers if server.problem is not None]
    if devices.colocated:
        resident = max(stage.static for stage in memory) + device.context_bytes
        reserved = config.rollout.gpu_memory_utilization * device.memory_bytes
        if resident + reserved > device.memory_bytes:
            legal = max((device.memory_bytes - resident) / device.memory_bytes, 0.0)
            problems.append(
                f"while servers generate, weights, gradients and optimizer state of a trainer rank keep "
                f"{resident / GIB:.1f} GiB and rollout.gpu_memory_utilization {config.rollout.gpu_memory_utilization} "
                f"takes {reserved / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB: lower it to "
                f"{int(legal * 100) / 100} or shard the trainer further"
            )
    return problems


def _notes(config: RunConfig, model: Model, notes: list[str]) -> list[str]:
    if not model.weights:
        notes = [f"no weights at {config.model.path}: sizes come from {model.source}", *notes]
    if config.precision.fp8 is not None:
        notes.append("FP8 is planned as bf16: weights, gradients and optimizer state are the same, activations smaller")
    return notes
