"""Every parameter tensor of a model as megatron-core holds it, and what of it one rank of a layout holds.

A tensor is cut over the tensor-parallel ranks, over the expert-parallel ranks, or held whole by each of them, as the
column- and row-parallel layers of megatron-core do it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_r1reward.model_folder.shape import ModelShape, TextShape, VisionShape
from megatron_r1reward.planner.planned_layout import Layout

Cut = Literal["tensor", "expert", "whole"]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    component: str
    numel: int
    cut: Cut = "whole"
    count: int = 1  # equal tensors; of experts, the tensors of all experts of a layer

    def on_rank(self, layout: Layout) -> tuple[int, int]:
        """Elements of one tensor on a rank, and how many of them a rank holds."""
        if self.cut == "expert":
            return self.numel // layout.etp, self.count // layout.ep
        return self.numel // (layout.tp if self.cut == "tensor" else 1), self.count


def language_layer(text: TextShape, layer: int) -> Iterator[Tensor]:
    """One decoder layer: fused QKV, output projection, gated MLP or experts, two norms."""
    yield Tensor(component="attention", numel=text.hidden * (text.query + text.key_value), cut="tensor")
    if text.qkv_bias:
        yield Tensor(component="attention", numel=text.query + text.key_value, cut="tensor")
    if text.qk_norm:
        yield Tensor(component="norms", numel=text.head_dim, count=2)
    yield Tensor(component="attention", numel=text.query * text.hidden, cut="tensor")
    if text.is_sparse(layer):
        experts = text.experts
        assert experts is not None
        yield Tensor(component="router", numel=experts.count * text.hidden)
        for numel in (2 * experts.ffn * text.hidden, experts.ffn * text.hidden):
            yield Tensor(component="experts", numel=numel, cut="expert", count=experts.count)
    else:
        yield Tensor(component="mlp", numel=2 * text.ffn * text.hidden, cut="tensor")
        yield Tensor(component="mlp", numel=text.ffn * text.hidden, cut="tensor")
    yield Tensor(component="norms", numel=text.hidden, count=2)


def _linear(component: str, inputs: int, outputs: int, *, row: bool = False, cut: Cut = "tensor") -> list[Tensor]:
    """A linear with bias; a row-parallel one holds its bias whole."""
    weight = Tensor(component=component, numel=inputs * outputs, cut=cut)
    return [weight, Tensor(component=component, numel=outputs, cut="whole" if row else cut)]


def _merger(vision: VisionShape, cut: Cut) -> list[Tensor]:
    wide = vision.hidden * vision.unit
    first = _linear("vision merger", wide, wide, cut=cut)
    return first + _linear("vision merger", wide, vision.out, row=True, cut=cut)


def vision_tower(vision: VisionShape, *, cut: Cut = "tensor") -> Iterator[Tensor]:
    """Patch embedding, blocks and mergers. `cut="whole"`: every rank holds the tower (image-sharded)."""
    per_norm = 1 if vision.gated else 2  # LayerNorm has a bias
    yield Tensor(component="vision tower", numel=vision.patch_values * vision.hidden)
    if not vision.gated:
        yield Tensor(component="vision tower", numel=vision.hidden)  # bias of the patch embedding
        yield Tensor(component="vision tower", numel=vision.position_embeddings * vision.hidden)
    for _ in range(vision.blocks):
        yield Tensor(component="vision tower", numel=vision.hidden, count=2 * per_norm)
        yield from _linear("vision tower", vision.hidden, 3 * vision.hidden, cut=cut)
        yield from _linear("vision tower", vision.hidden, vision.hidden, row=True, cut=cut)
        yield from _linear("vision tower", vision.hidden, vision.ffn * (2 if vision.gated else 1), cut=cut)
        yield from _linear("vision tower", vision.ffn, vision.hidden, row=True, cut=cut)
    yield Tensor(component="vision tower", numel=vision.hidden, count=per_norm)
    yield from _merger(vision, cut)
    for _ in range(vision.deepstack):  # normalised after the merge, over unit x hidden values
        yield Tensor(component="vision merger", numel=vision.hidden * vision.unit, count=2)
        yield from _merger(vision, cut)


def all_tensors(shape: ModelShape) -> Iterator[Tensor]:
    """Every parameter exactly once; a tied model has no head."""
    yield from vision_tower(shape.vision)
    yield _embedding(shape.text, "embedding")
    for layer in range(shape.text.layers):
        yield from language_layer(shape.text, layer)
    yield Tensor(component="norms", numel=shape.text.hidden)
    if not shape.text.tied:
        yield from _head(shape)


def _head(shape: ModelShape) -> list[Tensor]:
    """The LM head; or a scalar head, which every rank holds whole."""
    hidden = shape.text.hidden
    if shape.score_layers == 0:
        return [_embedding(shape.text, "head")]
    if shape.score_layers == 1:
        return [Tensor(component="head", numel=hidden)]
    return _linear("head", hidden, hidden, cut="whole") + _linear("head", hidden, 1, cut="whole")


def _embedding(text: TextShape, component: str) -> Tensor:
    return Tensor(component=component, numel=text.vocab * text.hidden, cut="tensor")


@lru_cache(maxsize=256)
def stage_tensors(shape: ModelShape, layout: Layout, stage: int) -> tuple[Tensor, ...]:
    """Parameters of one pipeline stage. The first holds the vision tower and the embedding, the last the final norm and
    the head; a tied model in a pipeline keeps a second copy of the embedding there."""
    text = shape.text
    tensors: list[Tensor] = []
    if stage == 0:
        tensors += vision_tower(shape.vision, cut="whole" if layout.vision_replicated else "tensor")
        tensors.append(_embedding(text, "embedding"))
    for layer in layout.layers_of(stage, text.layers):
        tensors += language_layer(text, layer)
    if stage == layout.pp - 1:
        tensors.append(Tensor(component="norms", numel=text.hidden))
        if not text.tied or layout.pp > 1:
            tensors += _head(shape)
    return tuple(tensors)


def by_component(tensors: Iterable[Tensor], layout: Layout | None = None) -> dict[str, int]:
    """Parameters per component: of the whole tensors, or of one rank of `layout`."""
    total: Counter[str] = Counter()
    for tensor in tensors:
        numel, count = (tensor.numel, tensor.count) if layout is None else tensor.on_rank(layout)
        total[tensor.component] += numel * count
    return dict(total)


@lru_cache(maxsize=256)
def active_per_token(text: TextShape, layers: tuple[int, ...]) -> int:
    """Parameters of these decoder layers that multiply one token: of the experts, `top_k`."""
    total = 0.0
    for layer in layers:
        parts = by_component(language_layer(text, layer))
        experts = parts.pop("experts", 0)
        share = text.experts.top_k / text.experts.count if text.experts else 0.0
        total += sum(parts.values()) - parts["norms"] + experts * share
    return round(total)
