"""Bytes that one trainer rank sends, per kind of collective, for one optimizer step.

Ring algorithms: an all-gather or reduce-scatter of N bytes over n ranks sends N (n - 1) / n per rank, an all-reduce
twice that.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_r1reward.model_folder.shape import ModelShape
from megatron_r1reward.planner.memory import GRADIENT_WIDTH
from megatron_r1reward.planner.parameters import by_component, stage_tensors
from megatron_r1reward.planner.planned_layout import Layout
from megatron_r1reward.planner.workload import MicroBatch


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
