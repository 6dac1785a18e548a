"""Bytes of one trainer rank, part by part, for every pipeline stage; of what autograd keeps for the backward pass
tensor by tensor, with the temporaries at its peak.

The lists of tensors follow the modules of `parallel/specs.py`: unfused norm (on a CPU), rotation, packed attention and
gated MLP of the `local` spec. `benchmarks/planner_error.py` compares them with what autograd saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from megatron_r1reward.model_folder.shape import ModelShape, TextShape, VisionShape
from megatron_r1reward.planner.devices import Device
from megatron_r1reward.planner.parameters import Tensor, stage_tensors
from megatron_r1reward.planner.planned_layout import Layout
from megatron_r1reward.planner.workload import MicroBatch, Workload

# Logits of the LM head that exist at one time, and the columns and values that a CPU converts to float32 at one time:
# kernels/lm_head.py and kernels/policy_loss/torch_rows.py; a test keeps them equal.
GPU_CHUNK_ROWS = 2048  # of float32 logits
CPU_CHUNK_BYTES, MAX_CPU_CHUNK_ROWS, CPU_COLUMNS, TILE_ELEMENTS = 24 << 20, 1024, 8192, 1 << 18
GIB = 2**30
NONE: frozenset[str] = frozenset()
GRADIENT_WIDTH = 4  # gradients are accumulated and reduced in float32
_START_ALIGNMENT = 64  # values; megatron-core's `_pad_start_of_param_if_needed`
_BUCKET_ALIGNMENT = 128  # values; `_pad_end_of_bucket_if_needed`: the least common multiple with the sharding ranks


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Bytes per value of weights and activations, whether the fused kernels of a GPU compute norms and head, and bytes
    per logit (`precision.logits`).

    torch's RMSNorm on a CPU is composed of small operations that keep the input and the normalised value in float32;
    the CUDA kernel keeps its input and one float32 per row.
    """

    width: int
    fused_norm: bool
    logits_width: int = 4

    def rms_norm(self, size: float) -> float:
        """Bytes kept per row."""
        return self.width * size + 4 if self.fused_norm else 8 * size + 4

    def layer_norm(self, size: float) -> float:
        return self.width * size + 8


def _attention(
    numerics: Numerics, *, query: float, key_value: float, heads: float, head_dim: int, keep_core: bool = True
) -> dict[str, float]:
    """Per token: rotation tables of queries and keys, rotated queries and keys, the fused QKV output (the values are a
    view of it), attention outputs per sequence and packed together, float32 log-sum-exp."""
    width = numerics.width
    tables = 4 * head_dim * width
    rotated = (query + key_value / 2) * width
    fused = (query + key_value) * width
    core = query * width + 4 * heads if keep_core else 0.0
    return {"rotation": tables, "queries, keys, values": rotated + fused, "attention output": core + query * width}


def language_layer(text: TextShape, layout: Layout, numerics: Numerics, *, sparse: bool) -> dict[str, float]:
    """Bytes per token of one decoder layer on one rank, without recomputation (selective: without the core)."""
    width, tp = numerics.width, layout.tp
    norm = numerics.rms_norm(text.hidden) / layout.stream_cut
    saved = {"norms": 2 * norm, "linear inputs": 2 * text.hidden / layout.stream_cut * width}
    saved |= _attention(
        numerics,
        query=text.query / tp,
        key_value=text.key_value / tp,
        heads=text.heads / tp,
        head_dim=text.head_dim,
        keep_core=layout.recompute == "none",
    )
    if text.qk_norm:
        saved["norms"] += (text.heads + text.groups) / tp * numerics.rms_norm(text.head_dim)
    if sparse:
        saved |= _experts(text, layout, numerics)
    else:
        # gate and up in one tensor, activated gate, up, their product
        saved["mlp"] = 5 * text.ffn / tp * width
    return saved


def _experts(text: TextShape, layout: Layout, numerics: Numerics) -> dict[str, float]:
    """Router in float32, the copies of each token that its experts get, and inside an expert the MLP's tensors before
    and after they are weighed. Balanced load is assumed."""
    experts, width = text.experts, numerics.width
    assert experts is not None
    cut = layout.stream_cut  # tokens are spread over these before they are dispatched
    copies = experts.top_k / cut * layout.etp
    promoted = 4 * text.hidden if width < 4 else 0  # float32 copy of the router's input
    chosen = 20 * experts.top_k  # two int64 indices and a float32 weight per copy
    return {
        "router": (promoted + 5 * experts.count + chosen) / cut,
        "dispatched tokens": copies * text.hidden * width,
        "experts": copies * (6 * experts.ffn / layout.etp * width + 4),
    }


def vision_block(vision: VisionShape, layout: Layout, numerics: Numerics) -> float:
    """Bytes per patch of one block of the tower on one rank."""
    tp = 1 if layout.vision_replicated else layout.tp
    width, hidden = numerics.width, vision.hidden
    norm = numerics.rms_norm(hidden) if vision.gated else numerics.layer_norm(hidden)
    saved = _attention(
        numerics, query=hidden / tp, key_value=2 * hidden / tp, heads=vision.heads / tp, head_dim=hidden // vision.heads
    )
    mlp = (5 if vision.gated else 2) * vision.ffn / tp * width
    return sum(saved.values()) + 2 * norm + 2 * hidden * width + mlp


def vision_ends(vision: VisionShape, layout: Layout, numerics: Numerics) -> float:
    """Bytes per patch outside the blocks: pixels, the final norm and the mergers."""
    tp = 1 if layout.vision_replicated else layout.tp
    width = numerics.width
    norm = numerics.rms_norm(vision.hidden) if vision.gated else numerics.layer_norm(vision.hidden)
    merger = vision.hidden * (1 + 2 / tp) * width  # its input; before and after GELU
    return vision.patch_values * width + norm + merger + vision.deepstack * (norm + merger)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes on one rank at the peak of one pipeline stage."""

    language: float
    vision: float
    working: float  # temporaries of the backward pass and one recomputed layer
    head: float  # logits of one chunk and the gradient of the LM head

    @property
    def total(self) -> float:
        return self.language + self.vision + self.working + self.head


def stage_activations(
    shape: ModelShape,
    layout: Layout,
    numerics: Numerics,
    batch: MicroBatch,
    *,
    stage: int,
    micro_batches: int,
    frozen: frozenset[str] = frozenset(),
    fused_loss: bool = False,
) -> Activations:
    """Peak bytes of pipeline stage `stage` when every micro-batch is like `batch`. `fused_loss`: the LM head forms the
    policy loss (RL), instead of log-probs (SFT)."""
    text, vision = shape.text, shape.vision
    tokens = batch.tokens / layout.cp
    layers = layout.layers_of(stage, text.layers)
    per_layer = [sum(language_layer(text, layout, numerics, sparse=text.is_sparse(i)).values()) for i in layers]
    in_flight = layout.chunks_in_flight(stage, micro_batches) / layout.vpp
    working = _backward_temporaries(text, layout, numerics) * tokens if layers else 0.0
    if layout.recompute == "full":  # the input of every group of layers, and one group while it is recomputed
        groups = -(-len(layers) // layout.recompute_num_layers)
        kept = groups * text.hidden * numerics.width / layout.stream_cut
        working += max(per_layer, default=0.0) * min(layout.recompute_num_layers, len(layers)) * tokens
    else:
        kept = sum(per_layer)
    language = in_flight * kept * tokens
    tower = 0.0
    if stage == 0 and batch.patches and not {"vision tower", "vision merger"} <= frozen:
        patches = batch.patches / (layout.tp * layout.cp if layout.vision_replicated else 1)
        block = vision_block(vision, layout, numerics)
        kept = block if not layout.recompute_vision else vision.hidden * numerics.width
        per_patch = (0 if "vision tower" in frozen else vision.blocks * kept) + vision_ends(vision, layout, numerics)
        tower = layout.chunks_in_flight(0, micro_batches) / layout.vpp * per_patch * patches
        if layout.recompute_vision:
            working = max(working, 2 * block * patches)  # one block again, and its gradients
    last = stage == layout.pp - 1
    if last:
        language += tokens * numerics.rms_norm(text.hidden) / layout.stream_cut
        language += batch.responses * text.hidden * numerics.width
    # The head is differentiated before the layers: only the larger of the two is alive at the peak.
    has_logits = last and not shape.score_layers
    head = head_workspace(text, layout, numerics, batch.responses, fused_loss=fused_loss) if has_logits else 0.0
    return Activations(
        language=language,
        vision=tower,
        working=working if working >= head else 0.0,
        head=head if head > working else 0.0,
    )


def _backward_temporaries(text: TextShape, layout: Layout, numerics: Numerics) -> float:
    """Per token: gradients alive together while a gated MLP is differentiated, and the residual stream's."""
    ffn = text.ffn if text.experts is None else max(text.experts.ffn * text.experts.top_k, text.hidden)
    return (4 * ffn / layout.tp + 2 * text.hidden) * numerics.width


def head_workspace(text: TextShape, layout: Layout, numerics: Numerics, responses: int, *, fused_loss: bool) -> float:
    """Peak bytes of the LM head beside its inputs: one chunk of logits, the gradient of the response rows, and what
    stands for the weight's gradient in autograd while the gradient itself is in megatron-core's buffer.

    `linear_log_probs` adds to that buffer chunk by chunk. `linear_policy_loss` (`fused_loss`) forms the weight's
    gradient in float32 in the forward pass and adds it in the backward pass, when the logits are gone; where tokens of
    a chunk are clipped it copies the logits of the others. Gradients of logits wider than the weights are rounded to
    the weights' type in a copy.
    """
    width, columns = numerics.width, text.vocab / layout.tp
    weights = columns * text.hidden
    rows = min(chunk_rows(numerics, columns), responses)
    logits, kept = rows * columns * numerics.logits_width, 0.0
    wide = numerics.logits_width > width
    rounded = rows * columns * width if wide else 0.0
    tile, copies = 0.0, 0.0
    if not numerics.fused_norm:
        tile = 3.0 * 4 * min(TILE_ELEMENTS, rows * columns)  # in float32, and what is computed from it
        if width < 4:  # float32 copies for the weight's gradient
            copies = 4.0 * rows * (min(CPU_COLUMNS, columns) + text.hidden)
    placeholder, gradient_rows = weights * width, responses * text.hidden * width
    held = float(gradient_rows)
    if fused_loss:
        held, kept = 2 * gradient_rows + 4 * weights, logits
    forming, multiplying = kept + max(tile, rounded), (0.0 if wide else kept) + rounded + copies
    return held + max(logits + max(forming, multiplying), placeholder if fused_loss else logits + placeholder)


def chunk_rows(numerics: Numerics, columns: float) -> int:
    """Rows whose logits exist at one time: `kernels.lm_head.default_chunk_rows`."""
    if numerics.fused_norm:
        return GPU_CHUNK_ROWS * 4 // numerics.logits_width
    return max(16, min(MAX_CPU_CHUNK_ROWS, int(CPU_CHUNK_BYTES // (4 * max(1, columns)))))


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage."""

    parameters: float
    gradients: float
    optimizer: float
    reference: float
    critic: float  # its parameters, gradients and optimizer state
    language_activations: float
    vision_activations: float
    working: float
    head: float
    overhead: float

    @property
    def static(self) -> float:
        """What stays between steps."""
        return self.parameters + self.gradients + self.optimizer + self.reference + self.critic

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
                critic=0,
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


def with_critic(policy: Sequence[StageMemory], critic: Sequence[StageMemory]) -> list[StageMemory]:
    """A policy and the critic that is trained beside it, before the policy: both stay, but only one of them has
    activations at a time."""
    stages = []
    for own, other in zip(policy, critic, strict=True):
        larger = max(own, other, key=lambda stage: stage.total - stage.static)
        kept = {name: getattr(own, name) for name in ("parameters", "gradients", "optimizer", "reference")}
        stages.append(replace(larger, **kept, critic=other.static))
    return stages
