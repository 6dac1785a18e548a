"""Every parameter tensor of a model as megatron-core holds it, and what of it one rank of a layout holds.

A tensor is cut over the tensor-parallel ranks, over the expert-parallel ranks, or held whole by each of them, as the
column- and row-parallel layers of megatron-core do it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_r1reward.planner.layout import Layout
from megatron_r1reward.planner.shapes import ModelShape, TextShape, VisionShape

Cut = Literal["tensor", "expert", "whole"]


@dataclass(frozen=True, kw_only=True)
class Tensor:
    component: str
    numel: int
    cut: Cut = "whole"

    def on_rank(self, layout: Layout) -> int:
        """Elements that one rank holds."""
        ranks = {"tensor": layout.tp, "expert": layout.ep * layout.etp, "whole": 1}[self.cut]
        return self.numel // ranks


def language_layer(text: TextShape, layer: int) -> Iterator[Tensor]:
    """One decoder layer: fused QKV, output projection, gated MLP or experts, two norms."""
    yield Tensor(component="attention", numel=text.hidden * (text.query + text.key_value), cut="tensor")
    if text.qkv_bias:
        yield Tensor(component="attention", numel=text.query + text.key_value, cut="tensor")
    if text.qk_norm:
        yield from [Tensor(component="norms", numel=text.head_dim)] * 2
    yield Tensor(component="attention", numel=text.query * text.hidden, cut="tensor")
    if text.is_sparse(layer):
        experts = text.experts
        assert experts is not None
        yield Tensor(component="router", numel=experts.count * text.hidden)
        for _ in range(experts.count):
            yield Tensor(component="experts", numel=2 * experts.ffn * text.hidden, cut="expert")
            yield Tensor(component="experts", numel=experts.ffn * text.hidden, cut="expert")
    else:
        yield Tensor(component="mlp", numel=2 * text.ffn * text.hidden, cut="tensor")
        yield Tensor(component="mlp", numel=text.ffn * text.hidden, cut="tensor")
    yield from [Tensor(component="norms", numel=text.hidden)] * 2


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
    norm = [Tensor(component="vision tower", numel=vision.hidden)] * (1 if vision.gated else 2)  # LayerNorm has a bias
    yield Tensor(component="vision tower", numel=vision.patch_values * vision.hidden)
    if not vision.gated:
        yield Tensor(component="vision tower", numel=vision.hidden)  # bias of the patch embedding
        yield Tensor(component="vision tower", numel=vision.position_embeddings * vision.hidden)
    for _ in range(vision.blocks):
        yield from norm * 2
        yield from _linear("vision tower", vision.hidden, 3 * vision.hidden, cut=cut)
        yield from _linear("vision tower", vision.hidden, vision.hidden, row=True, cut=cut)
        yield from _linear("vision tower", vision.hidden, vision.ffn * (2 if vision.gated else 1), cut=cut)
        yield from _linear("vision tower", vision.ffn, vision.hidden, row=True, cut=cut)
    yield from norm
    yield from _merger(vision, cut)
    for _ in range(vision.deepstack):  # normalised after the merge, over unit x hidden values
        yield from [Tensor(component="vision merger", numel=vision.hidden * vision.unit)] * 2
        yield from _merger(vision, cut)


def all_tensors(shape: ModelShape) -> Iterator[Tensor]:
    """Every parameter exactly once; a tied model has no head."""
    yield from vision_tower(shape.vision)
    yield _embedding(shape.text, "embedding")
    for layer in range(shape.text.layers):
        yield from language_layer(shape.text, layer)
    yield Tensor(component="norms", numel=shape.text.hidden)
    if not shape.text.tied:
        yield _embedding(shape.text, "head")


def _embedding(text: TextShape, component: str) -> Tensor:
    return Tensor(component=component, numel=text.vocab * text.hidden, cut="tensor")


def stage_tensors(shape: ModelShape, layout: Layout, stage: int) -> Iterator[Tensor]:
    """Parameters of one pipeline stage. The first holds the vision tower and the embedding, the last the final norm and
    the head; a tied model in a pipeline keeps a second copy of the embedding there."""
    text = shape.text
    if stage == 0:
        yield from vision_tower(shape.vision, cut="whole" if layout.vision_replicated else "tensor")
        yield _embedding(text, "embedding")
    for layer in layout.layers_of(stage, text.layers):
        yield from language_layer(text, layer)
    if stage == layout.pp - 1:
        yield Tensor(component="norms", numel=text.hidden)
        if not text.tied or layout.pp > 1:
            yield _embedding(text, "head")


def by_component(tensors: Iterable[Tensor], layout: Layout | None = None) -> dict[str, int]:
    """Parameters per component: of the whole tensors, or of one rank of `layout`."""
    total: Counter[str] = Counter()
    for tensor in tensors:
        total[tensor.component] += tensor.numel if layout is None else tensor.on_rank(layout)
    return dict(total)


def active_per_token(shape: ModelShape) -> int:
    """Parameters of the language layers that multiply one token: experts count `top_k` of them."""
    text = shape.text
    total = 0
    for layer in range(text.layers):
        for tensor in language_layer(text, layer):
            share = 1.0
            if tensor.component == "experts":
                assert text.experts is not None
                share = text.experts.top_k / text.experts.count
            total += int(tensor.numel * share) if tensor.component != "norms" else 0
    return total
