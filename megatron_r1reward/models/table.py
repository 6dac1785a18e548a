"""Weight tables under the choices of a run file: layer implementation and sharing of the vision tower."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_r1reward.models.mapping import Entry, Layout, Tensors
from megatron_r1reward.parallel.specs_te import parameter_name


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A layout whose tensor every tensor-parallel rank holds whole."""

    layout: Layout

    def merge(self, parts: Tensors) -> torch.Tensor:
        return self.layout.merge(parts)

    def split(self, full: torch.Tensor) -> Tensors:
        return self.layout.split(full)

    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return full

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return shards[0]


def adapt_table(table: Iterable[Entry], *, transformer_impl: str, whole_vision: bool) -> list[Entry]:
    """The family's table for this run: Transformer Engine's parameter names, and whole vision weights on every rank."""
    adapted = []
    for entry in table:
        if whole_vision and entry.megatron.startswith("vision."):
            entry = replace(entry, layout=Whole(layout=entry.layout))
        if transformer_impl == "transformer_engine":
            entry = replace(entry, megatron=parameter_name(entry.megatron))
        adapted.append(entry)
    return adapted
