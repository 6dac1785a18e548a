"""Which parallel layouts a model allows: refusals at configuration time, with the reason and the nearest legal layout.

Also the split of layers over pipeline chunks, including where the vision tower goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_r1reward.config.schema import ParallelSection
from megatron_r1reward.model_folder.shape import ModelShape

MAX_SEARCHED_SIZE = 64  # largest tensor, pipeline or context size that is proposed


def layout_problem(shape: ModelShape, parallel: ParallelSection, world_size: int | None = None) -> str | None:
    """The first reason why megatron-core cannot run `shape` under `parallel`; None when it can."""
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    chunks = pp * parallel.virtual_pipeline_model_parallel_size
    text, vision = shape.text, shape.vision
    ffn_sizes = shape.cut_ffn_sizes(whole_experts=parallel.expert_model_parallel_size > 1)
    # The vocabulary is padded (`padded_vocabulary`).
    divided = {"num_attention_heads": text.heads} | {f"feed-forward size {size}": size for size in ffn_sizes}
    if parallel.vision == "tensor_parallel":
        divided |= {"vision num_heads": vision.heads, "vision intermediate_size": vision.ffn}
    for name, size in divided.items():
        if size % tp:
            hint = "; parallel.vision = 'image_sharded' lifts this" if name.startswith("vision") else ""
            return f"tensor_model_parallel_size {tp} does not divide {name} {size}{hint}"
    groups = text.groups
    if groups % tp and tp % groups:
        return f"tensor_model_parallel_size {tp} and num_key_value_heads {groups}: one must divide the other"
    needed = chunks - (parallel.vision_placement == "own_stage")
    if needed > text.layers:
        return f"{chunks} pipeline chunks are more than the {text.layers} layers can fill"
    if cp > 1 and parallel.context_parallel_comm == "a2a":
        for name, heads in (("attention", text.heads), ("key and value", max(groups, tp))):
            if (heads // tp) % cp:
                return f"context_parallel_comm 'a2a' cuts {heads // tp} {name} heads per rank into {cp}"
    if world_size is not None and world_size % (tp * pp * cp):
        return (
            f"{world_size} ranks cannot hold replicas of tensor_model_parallel_size {tp} x "
            f"pipeline_model_parallel_size {pp} x context_parallel_size {cp}: start a multiple of {tp * pp * cp} ranks"
        )
    return None


def expert_problem(shape: ModelShape, parallel: ParallelSection, world_size: int | None = None) -> str | None:
    """Why the experts cannot be shared out like this, and what can; None when they can, or there are none."""
    experts, ep = shape.text.experts, parallel.expert_model_parallel_size
    if experts is None:
        return f"expert_model_parallel_size {ep}, but the model has no experts: set it to 1" if ep > 1 else None
    if parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel:
        return (
            "experts with tensor_model_parallel_size > 1 need sequence_parallel = true: every rank would route all "
            "tokens otherwise"
        )
    needed = parallel.expert_tensor_parallel_size * parallel.pipeline_model_parallel_size

    def fits(size: int) -> bool:
        return experts.count % size == 0 and (world_size is None or world_size % (needed * size) == 0)

    if fits(ep):
        return None
    ranks = f" and, times {needed} (expert tensor x pipeline ranks), the {world_size} ranks" if world_size else ""
    legal = next((size for size in range(ep, 0, -1) if fits(size)), 1)
    return (
        f"expert_model_parallel_size {ep} has to divide {experts.count} experts{ranks}: "
        f"the nearest legal size is {legal}"
    )


def padded_vocabulary(rows: int, parallel: ParallelSection) -> int:
    """Rows of embedding and head over all tensor-parallel ranks: what does not divide is filled up. Padding rows are
    zero, take no part in the softmax, get no gradient, and are in no exported folder."""
    tp = parallel.tensor_model_parallel_size
    return -(-rows // tp) * tp


def _candidates(parallel: ParallelSection) -> Iterator[ParallelSection]:
    def near(size: int) -> list[int]:
        return sorted({size, *(2**k for k in range(int(math.log2(MAX_SEARCHED_SIZE)) + 1)), *range(1, size)})

    for tp in near(parallel.tensor_model_parallel_size):
        for pp in near(parallel.pipeline_model_parallel_size):
            for cp in near(parallel.context_parallel_size):
                virtual = range(1, parallel.virtual_pipeline_model_parallel_size + 1) if pp > 1 else (1,)
                placement = parallel.vision_placement if pp > 1 else "first_stage"
                for vpp in virtual:
                    yield parallel.model_copy(
                        update={
                            "tensor_model_parallel_size": tp,
                            "pipeline_model_parallel_size": pp,
                            "context_parallel_size": cp,
                            "virtual_pipeline_model_parallel_size": vpp,
                            "vision_placement": placement,
                        }
                    )


def nearest_layout(shape: ModelShape, parallel: ParallelSection, world_size: int | None = None) -> ParallelSection:
    """The legal layout whose sizes differ by the smallest factors, then with the fewest ranks."""

    def sizes(layout: ParallelSection) -> tuple[int, ...]:
        return (
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            layout.context_parallel_size,
            layout.virtual_pipeline_model_parallel_size,
        )

    def distance(layout: ParallelSection) -> tuple[float, int]:
        pairs = zip(sizes(layout), sizes(parallel), strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs), math.prod(sizes(layout)[:3])

    for layout in sorted(_candidates(parallel), key=distance):
        if layout_problem(shape, layout, world_size) is None:
            return layout
    raise AssertionError("a single rank always holds a model")


def describe(parallel: ParallelSection) -> str:
    """The layout in the run file's words, sizes of 1 left out."""
    names = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
    )
    parts = [f"{name} {getattr(parallel, name)}" for name in names if getattr(parallel, name) > 1]
    return ", ".join(parts) or "one rank per replica (all sizes 1)"


def check_layout(shape: ModelShape, parallel: ParallelSection) -> None:
    """ValueError with the reason and the nearest legal layout when `parallel` does not fit the model."""
    problem = layout_problem(shape, parallel)
    if problem is not None:
        raise ValueError(f"{problem}. The nearest legal layout: {describe(nearest_layout(shape, parallel))}")
    problem = expert_problem(shape, parallel)
    if problem is not None:
        raise ValueError(problem)


def split_layers(shape: ModelShape, parallel: ParallelSection) -> list[int]:
    """Language-model layers of every pipeline chunk, in model order: chunk v * pp + r is chunk v of stage r.

    The vision tower sits in chunk 0. "first_stage" ignores its cost; "balanced" gives stage 0 fewer layers so that
    tower and layers weigh the same everywhere; "own_stage" leaves chunk 0 without layers.
    """
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    layers, chunks = shape.text.layers, pp * vpp
    if parallel.vision_placement == "own_stage":
        return [0, *_spread(layers, chunks - 1)]
    if parallel.vision_placement == "first_stage":
        return _spread(layers, chunks)
    tower = shape.vision_layers_per_token * parallel.image_token_share
    first = round(max(0.0, (layers + tower) / pp - tower))
    stages = [first, *_spread(layers - first, pp - 1)]
    by_stage = [_spread(count, vpp) for count in stages]
    return [by_stage[stage][chunk] for chunk in range(vpp) for stage in range(pp)]


def _spread(total: int, parts: int) -> list[int]:
    """`total` over `parts`, larger parts last: the first chunk also embeds, later ones fill and drain."""
    return [total // parts + (i >= parts - total % parts) for i in range(parts)]


def pipeline_layout(shape: ModelShape, parallel: ParallelSection) -> list[list[str]] | None:
    """megatron-core's `pipeline_model_parallel_layout`; None where its default, equal split says the same."""
    layers = split_layers(shape, parallel)
    if len(set(layers)) == 1:
        return None
    rows = [["decoder"] * count for count in layers]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    return rows
