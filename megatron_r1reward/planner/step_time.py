"""Predicted seconds of a training step: FLOPs, bytes sent, seconds, and model FLOPs utilization (MFU).

FLOPs are those of the forward pass; a multiplication and an addition count as two. Training needs three times these
(forward, gradients of inputs, gradients of weights): the definition behind MFU. Recomputation adds work but no model
FLOPs. Bytes are those that one trainer rank sends, per kind of collective, for one optimizer step, by ring algorithms:
an all-gather or reduce-scatter of N bytes over n ranks sends N (n - 1) / n per rank, an all-reduce twice that.

Every term is work divided by an achieved rate; the achieved share of peak is an assumption of the device table. Phases
of an RL step run one after the other; the judge is not counted, its calls overlap generation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from megatron_r1reward.model_folder.shape import ModelShape, TextShape, VisionShape
from megatron_r1reward.planner.devices import Device
from megatron_r1reward.planner.memory import GRADIENT_WIDTH
from megatron_r1reward.planner.parameters import active_per_token, by_component, stage_tensors
from megatron_r1reward.planner.planned_layout import Layout
from megatron_r1reward.planner.workload import MicroBatch, Workload


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Bytes sent by one rank. All but `data_parallel` are per micro-batch, forward and backward together."""

    tensor_parallel: float
    vision: float  # inside the tower, or its embeddings' gather
    context_parallel: float
    pipeline: float
    experts: float
    data_parallel: float  # gradients and parameters, once per optimizer step

    @property
    def per_micro_batch(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self)) - self.data_parallel


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks


def volumes(shape: ModelShape, layout: Layout, batch: MicroBatch, width: int, *, stage: int = 0) -> Communication:
    """Volumes of a rank of pipeline stage `stage`; `width` bytes per activation."""
    text = shape.text
    tokens = batch.tokens / layout.cp
    layers = layout.layers_of(stage, text.layers)
    stream = tokens * text.hidden * width
    # Per linear pair. Sequence parallel: all-gather before and reduce-scatter after it, the same in the backward pass,
    # and the input gathered once more for the weight gradient. Otherwise one all-reduce each way.
    passes = 5 if layout.sequence_parallel else 4
    if layout.recompute == "full":
        passes += 2
    sparse = sum(text.is_sparse(layer) for layer in layers)
    pairs = 2 * len(layers) - sparse  # experts are no linear pair of the residual stream
    tensor = pairs * passes * stream * _share(layout.tp)
    keys = tokens * text.key_value / layout.tp * width
    context = len(layers) * 3 * (layout.cp - 1) * keys  # forward, and keys with gradients in the backward pass
    pipeline = 2 * stream / layout.stream_cut * layout.vpp if layout.pp > 1 else 0.0
    copies = 0.0
    if text.experts is not None:  # dispatched and combined, forward and backward; gathered where experts are cut
        sent = stream / layout.stream_cut * text.experts.top_k
        copies = 4 * sparse * sent * (_share(layout.ep) + layout.etp - 1)
    return Communication(
        tensor_parallel=tensor,
        vision=_vision(shape, layout, batch, width) if stage == 0 else 0.0,
        context_parallel=context,
        pipeline=pipeline,
        experts=copies,
        data_parallel=_data_parallel(shape, layout, width, stage),
    )


def _vision(shape: ModelShape, layout: Layout, batch: MicroBatch, width: int) -> float:
    vision = shape.vision
    if layout.vision_replicated:  # embeddings are gathered, their gradients scattered back
        both = layout.tp * layout.cp
        return 2 * batch.patches / vision.unit * vision.out * (1 + vision.deepstack) * width * _share(both)
    return 8 * vision.blocks * batch.patches * vision.hidden * width * _share(layout.tp)


def _data_parallel(shape: ModelShape, layout: Layout, width: int, stage: int) -> float:
    total = 0.0
    for expert in (False, True):
        tensors = [t for t in stage_tensors(shape, layout, stage) if (t.cut == "expert") == expert]
        held = sum(by_component(tensors, layout).values())
        ranks = layout.expert_shards if expert else layout.shards
        per_value = GRADIENT_WIDTH + width if layout.distributed_optimizer else 2 * GRADIENT_WIDTH
        total += held * per_value * _share(ranks)
    return total


def language_flops(text: TextShape, layers: Iterable[int], *, tokens: float, length: float) -> float:
    """`tokens` tokens in sequences of `length` through these decoder layers. Causal attention: each token meets half of
    its sequence, once for the scores and once for the values."""
    layers = tuple(layers)
    scores = 2 * text.query * length * tokens * len(layers)
    return 2 * active_per_token(text, layers) * tokens + scores


def head_flops(shape: ModelShape, rows: float) -> float:
    """The LM head on `rows` response tokens; a scalar head is nothing beside it."""
    return 0.0 if shape.score_layers else 2 * shape.text.vocab * shape.text.hidden * rows


def vision_flops(tower: VisionShape, *, patches: float, frame: float) -> float:
    """`patches` patches in frames of `frame` through the tower and its mergers."""
    block = 2 * (4 * tower.hidden**2 + (3 if tower.gated else 2) * tower.hidden * tower.ffn)
    window = min(tower.window_patches or frame, frame)
    windowed = tower.blocks - tower.full_attention_blocks
    scores = 4 * tower.hidden * (tower.full_attention_blocks * frame + windowed * window)
    wide = tower.hidden * tower.unit
    merger = 2 * (wide**2 + wide * tower.out) / tower.unit * (1 + tower.deepstack)
    embed = 2 * tower.patch_values * tower.hidden
    return patches * (block * tower.blocks + scores + merger + embed)


def sequence_flops(shape: ModelShape, *, tokens: float, patches: float, frame: float, responses: float) -> float:
    """One sequence of `tokens` tokens with its images, and the head on its response."""
    return (
        language_flops(shape.text, range(shape.text.layers), tokens=tokens, length=tokens)
        + vision_flops(shape.vision, patches=patches, frame=frame)
        + head_flops(shape, responses)
    )


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
    decoder = language_flops(shape.text, layers, tokens=batch.tokens, length=batch.longest) / ranks
    other = 0.0
    if stage == 0:
        over = ranks if layout.vision_replicated else layout.tp  # context ranks repeat a tensor-parallel tower
        other += vision_flops(shape.vision, patches=batch.patches, frame=frame) / over
    if stage == layout.pp - 1:
        other += head_flops(shape, batch.responses) / layout.tp
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
            work += head_flops(shape, workload.mean.responses) / layout.tp
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
    return sequence_flops(
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
