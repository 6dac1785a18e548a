"""Weight tables under the choices of a run file: layer implementation and sharing of the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_r1reward.model_folder.weight_table import Layout, Tensors, Views, WeightTable


@dataclass(frozen=True, kw_only=True)
class Whole(Layout):
    """A layout whose tensor every tensor-parallel rank holds whole."""

    layout: Layout

    def merge_views(self, parts: Tensors) -> Views:
        return self.layout.merge_views(parts)

    def split_views(self, full: torch.Tensor) -> list[Views]:
        return self.layout.split_views(full)

    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return full

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return shards[0]


def adapt_table(table: WeightTable, *, transformer_impl: str, whole_vision: bool) -> WeightTable:
    """The family's table for this run: Transformer Engine's parameter names, which are those of checkpoints, and whole
    vision weights on every rank."""
    adapted = []
    for entry in table:
        if whole_vision and entry.megatron.startswith("vision."):
            entry = replace(entry, layout=Whole(layout=entry.layout))
        if transformer_impl == "transformer_engine" and entry.saved_as is not None:
            entry = replace(entry, megatron=entry.saved_as)
        adapted.append(entry)
    return replace(table, entries=tuple(adapted))
