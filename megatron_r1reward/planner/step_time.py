"""Predicted seconds of a training step, and model FLOPs utilization (MFU).

Every term is work divided by an achieved rate; the achieved share of peak is an assumption of the device table. Phases
of an RL step run one after the other; the judge is not counted, its calls overlap generation.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1reward.model_folder.shape import ModelShape
from megatron_r1reward.planner import flops
from megatron_r1reward.planner.communication import Communication, volumes
from megatron_r1reward.planner.devices import Device
from megatron_r1reward.planner.planned_layout import Layout
from megatron_r1reward.planner.workload import MicroBatch, Workload


@dataclass(frozen=True, kw_only=True)
class UpdateTime:
    """One optimizer step. `compute` is the slowest stage's; MFU counts model FLOPs of all ranks."""

    compute: float
    communication: float  # exposed, inside micro-batches
    bubble: float
    data_parallel: float  # exposed
    model_flops: float
    mfu: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.bubble + self.data_parallel


def stage_forward(shape: ModelShape, layout: Layout, batch: MicroBatch, frame: int, stage: int) -> tuple[float, float]:
    """FLOPs of one rank for the forward pass of one micro-batch in pipeline stage `stage`: decoder layers, and
    everything else (tower, head)."""
    ranks = layout.tp * layout.cp
    layers = layout.layers_of(stage, shape.text.layers)
    decoder = flops.language(shape.text, layers, tokens=batch.tokens, length=batch.longest) / ranks
    other = 0.0
    if stage == 0:
        over = ranks if layout.vision_replicated else layout.tp  # context ranks repeat a tensor-parallel tower
        other += flops.vision(shape.vision, patches=batch.patches, frame=frame) / over
    if stage == layout.pp - 1:
        other += flops.head(shape.text, batch.responses) / layout.tp
    return decoder, other


def _micro_batch_seconds(
    shape: ModelShape,
    layout: Layout,
    workload: Workload,
    device: Device,
    stage: int,
    *,
    train: bool,
    fused_loss: bool = False,
) -> float:
    decoder, other = stage_forward(shape, layout, workload.mean, workload.frame_patches, stage)
    work = decoder + other
    if train:
        work = 3 * work + (decoder if layout.recompute == "full" else 0.0)
        if stage == layout.pp - 1 and not fused_loss:  # linear_log_probs forms its logits again
            work += flops.head(shape.text, workload.mean.responses) / layout.tp
    return work / (device.bf16_flops * device.compute_efficiency)


@dataclass(frozen=True, kw_only=True)
class _Links:
    """Achieved bytes per second inside a tensor x context group, between expert-parallel ranks, and between replicas
    and stages. megatron-core numbers tensor-parallel ranks first, pipeline stages last."""

    inside: float
    experts: float
    outside: float

    def exposed(self, traffic: Communication) -> float:
        inside = traffic.tensor_parallel + traffic.vision + traffic.context_parallel
        return inside / self.inside + traffic.experts / self.experts + traffic.pipeline / self.outside


def _links(device: Device, layout: Layout, node: int) -> _Links:
    def rate(ranks: int) -> float:
        peak = device.link_bytes if ranks <= node else min(device.link_bytes, device.network_bytes)
        return peak * device.link_efficiency

    inside = layout.tp * layout.cp
    return _Links(
        inside=rate(inside), experts=rate(max(layout.ep * layout.etp, layout.ep * inside)), outside=rate(layout.world)
    )


def update_time(
    shape: ModelShape,
    layout: Layout,
    workload: Workload,
    device: Device,
    *,
    width: int,
    node: int,
    fused_loss: bool = False,
) -> UpdateTime:
    """One optimizer step on all ranks; `node` devices share a node. `fused_loss`: the LM head forms the loss."""
    links = _links(device, layout, node)
    stages = range(layout.pp)
    compute = max(
        _micro_batch_seconds(shape, layout, workload, device, s, train=True, fused_loss=fused_loss) for s in stages
    )
    traffic = [volumes(shape, layout, workload.mean, width, stage=s) for s in stages]
    exposed = max(links.exposed(t) for t in traffic)
    count = workload.micro_batches
    bubble = (layout.pp - 1) / layout.vpp * (compute + exposed)
    replicas = max(t.data_parallel for t in traffic) / links.outside
    if layout.overlap_grad_reduce:  # hidden behind the backward pass of the last micro-batch, two thirds of it
        replicas = max(replicas - 2 / 3 * compute, 0.0)
    model = 3 * workload.sequences * _mean_sequence(shape, workload)
    seconds = count * (compute + exposed) + bubble + replicas
    return UpdateTime(
        compute=count * compute,
        communication=count * exposed,
        bubble=bubble,
        data_parallel=replicas,
        model_flops=model,
        mfu=model / (seconds * device.bf16_flops * layout.world),
    )


def _mean_sequence(shape: ModelShape, workload: Workload) -> float:
    return flops.sequence_forward(
        shape,
        tokens=workload.sequence_tokens,
        patches=workload.patches,
        frame=workload.frame_patches,
        responses=workload.response_tokens,
    )


def log_prob_seconds(
    shape: ModelShape, layout: Layout, workload: Workload, device: Device, *, width: int, node: int
) -> float:
    """Forward passes over all sequences of one rollout batch: log-probs of the policy, or of the reference."""
    links = _links(device, layout, node)
    compute = max(_micro_batch_seconds(shape, layout, workload, device, s, train=False) for s in range(layout.pp))
    exposed = max(links.exposed(volumes(shape, layout, workload.mean, width, stage=s)) for s in range(layout.pp))
    count = workload.micro_batches * workload.optimizer_steps
    # a forward pass sends about a third of what a training step does
    return (count + (layout.pp - 1) / layout.vpp) * (compute + exposed / 3)


def push_seconds(model_bytes: float, device: Device, *, one_node: bool) -> float:
    """One rank sends every weight to each server group at once."""
    rate = device.link_bytes if one_node else min(device.link_bytes, device.network_bytes)
    return model_bytes / (rate * device.link_efficiency)
