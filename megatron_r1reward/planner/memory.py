"""Bytes of one trainer rank, part by part, for every pipeline stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from megatron_r1reward.planner.activations import Numerics, stage_activations
from megatron_r1reward.planner.devices import Device
from megatron_r1reward.planner.layout import Layout
from megatron_r1reward.planner.parameters import Tensor, stage_tensors
from megatron_r1reward.planner.shapes import ModelShape
from megatron_r1reward.planner.workload import Workload

GIB = 2**30
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


def buffer_elements(numels: list[int], shards: int, *, distributed: bool) -> int:
    """Elements of a megatron-core gradient buffer (one bucket): padded only where it is sharded."""
    if not distributed:
        return sum(numels)
    aligned = sum(-(-n // _START_ALIGNMENT) * _START_ALIGNMENT for n in numels)
    bucket = math.lcm(_BUCKET_ALIGNMENT, shards)
    return -(-aligned // bucket) * bucket


def state_bytes(tensors: list[Tensor], layout: Layout, width: int, *, frozen: frozenset[str] = frozenset()) -> StateBytes:
    """Weights, gradient buffers and optimizer state of one rank.

    bf16 weights have a float32 master copy beside the two float32 moments; float32 weights are their own master. The
    distributed optimizer keeps 1/shards of master and moments.
    """
    parameters = sum(t.on_rank(layout) for t in tensors) * width
    gradients = optimizer = 0
    for expert in (False, True):
        trained = [t for t in tensors if (t.cut == "expert") == expert and t.component not in frozen]
        if not trained:
            continue
        shards = layout.expert_shards if expert else layout.shards
        elements = buffer_elements(
            [t.on_rank(layout) for t in trained], shards, distributed=layout.distributed_optimizer
        )
        held = sum(t.on_rank(layout) for t in trained)
        gradients += elements * GRADIENT_WIDTH
        per_value = 8 if width == 4 else 12
        optimizer += (math.ceil(held / shards) if layout.distributed_optimizer else held) * per_value
    return StateBytes(parameters=parameters, gradients=gradients, optimizer=optimizer)


def stage_memory(
    shape: ModelShape,
    layout: Layout,
    numerics: Numerics,
    workload: Workload,
    device: Device,
    *,
    stage: int,
    with_reference: bool = False,
    freeze_vision: bool = False,
) -> StageMemory:
    """Peak bytes of one rank of pipeline stage `stage`."""
    frozen = frozenset({"vision tower", "vision merger"}) if freeze_vision else frozenset()
    state = state_bytes(list(stage_tensors(shape, layout, stage)), layout, numerics.width, frozen=frozen)
    peaks = [
        stage_activations(
            shape,
            layout,
            numerics,
            batch,
            stage=stage,
            micro_batches=workload.micro_batches,
            freeze_vision=freeze_vision,
        )
        for batch in (workload.filled, workload.worst)
    ]
    # working memory and head workspace are not alive together: the head is differentiated first
    peak = max(peaks, key=lambda a: a.language + a.vision + max(a.working, a.head))
    head_first = peak.head > peak.working
    dynamic = peak.language + peak.vision + max(peak.working, peak.head)
    return StageMemory(
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        reference=state.parameters if with_reference else 0,
        language_activations=peak.language,
        vision_activations=peak.vision,
        working=0.0 if head_first else peak.working,
        head=peak.head if head_first else 0.0,
        overhead=device.context_bytes
        + (device.communicator_bytes if layout.world > 1 else 0.0)
        + device.fragmentation * dynamic,
    )


def trainer_memory(
    shape: ModelShape,
    layout: Layout,
    numerics: Numerics,
    workload: Workload,
    device: Device,
    *,
    with_reference: bool = False,
    freeze_vision: bool = False,
) -> list[StageMemory]:
    """One entry per pipeline stage."""
    return [
        stage_memory(
            shape,
            layout,
            numerics,
            workload,
            device,
            stage=stage,
            with_reference=with_reference,
            freeze_vision=freeze_vision,
        )
        for stage in range(layout.pp)
    ]
