"""Bytes of one trainer rank, part by part, for every pipeline stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from megatron_r1reward.model_folder.shape import ModelShape
from megatron_r1reward.planner.activations import Numerics, stage_activations
from megatron_r1reward.planner.devices import Device
from megatron_r1reward.planner.parameters import Tensor, stage_tensors
from megatron_r1reward.planner.planned_layout import Layout
from megatron_r1reward.planner.workload import Workload

GIB = 2**30
NONE: frozenset[str] = frozenset()
GRADIENT_WIDTH = 4  # gradients are accumulated and reduced in float32
_START_ALIGNMENT = 64  # values; megatron-core's `_pad_start_of_param_if_needed`
_BUCKET_ALIGNMENT = 128  # values; `_pad_end_of_bucket_if_needed`: the least common multiple with the sharding ranks


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage."""

    parameters: float
    gradients: float
    optimizer: float
    reference: float
    language_activations: float
    vision_activations: float
    working: float
    head: float
    overhead: float

    @property
    def static(self) -> float:
        """What stays between steps."""
        return self.parameters + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def parts(self) -> dict[str, float]:
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    parameters: int
    gradients: int
    optimizer: int


def buffer_elements(sizes: Iterable[tuple[int, int]], shards: int, *, distributed: bool) -> int:
    """Elements of a megatron-core gradient buffer of one bucket that holds `count` tensors of `numel` values for every
    (numel, count): padded only where it is sharded."""
    if not distributed:
        return sum(numel * count for numel, count in sizes)
    aligned = sum(-(-numel // _START_ALIGNMENT) * _START_ALIGNMENT * count for numel, count in sizes)
    bucket = math.lcm(_BUCKET_ALIGNMENT, shards)
    return -(-aligned // bucket) * bucket


def state_bytes(tensors: Sequence[Tensor], layout: Layout, width: int, frozen: frozenset[str] = NONE) -> StateBytes:
    """Weights, gradient buffers and optimizer state of one rank; `frozen` components have neither of the latter.

    bf16 weights have a float32 master copy beside the two float32 moments; float32 weights are their own master. The
    distributed optimizer keeps 1/shards of master and moments.
    """
    held = [tensor.on_rank(layout) for tensor in tensors]
    gradients = optimizer = 0
    for expert in (False, True):
        trained = [
            size
            for size, tensor in zip(held, tensors, strict=True)
            if (tensor.cut == "expert") == expert and tensor.component not in frozen
        ]
        shards = layout.expert_shards if expert else layout.shards
        elements = buffer_elements(trained, shards, distributed=layout.distributed_optimizer)
        gradients += elements * GRADIENT_WIDTH
        values = sum(numel * count for numel, count in trained)
        optimizer += math.ceil(values / shards if layout.distributed_optimizer else values) * (8 if width == 4 else 12)
    parameters = sum(numel * count for numel, count in held) * width
    return StateBytes(parameters=parameters, gradients=gradients, optimizer=optimizer)


def trainer_memory(
    shape: ModelShape,
    layout: Layout,
    numerics: Numerics,
    workload: Workload,
    device: Device,
    *,
    frozen: frozenset[str] = NONE,
    with_reference: bool = False,
    fused_loss: bool = False,
) -> list[StageMemory]:
    """Peak bytes of one rank of every pipeline stage; `fused_loss` as for `stage_activations`."""
    stages = []
    for stage in range(layout.pp):
        state = state_bytes(stage_tensors(shape, layout, stage), layout, numerics.width, frozen)
        peak = max(
            (
                stage_activations(
                    shape,
                    layout,
                    numerics,
                    batch,
                    stage=stage,
                    micro_batches=workload.micro_batches,
                    frozen=frozen,
                    fused_loss=fused_loss,
                )
                for batch in workload.largest
            ),
            key=lambda activations: activations.total,
        )
        stages.append(
            StageMemory(
                parameters=state.parameters,
                gradients=state.gradients,
                optimizer=state.optimizer,
                reference=state.parameters if with_reference else 0,
                language_activations=peak.language,
                vision_activations=peak.vision,
                working=peak.working,
                head=peak.head,
                overhead=device.context_bytes
                + (device.communicator_bytes if layout.world > 1 else 0.0)
                + device.fragmentation * peak.total,
            )
        )
    return stages
