"""Weight tables: how Hugging Face tensors and megatron-core parameters correspond.

A family is one list of `Entry`s. The layout of an entry says how Hugging Face tensors merge into one Megatron tensor,
how that is split back, and how it is cut over tensor-parallel ranks; import, export and the weight push all read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Tensors = tuple[torch.Tensor, ...]


class Layout(Protocol):
    def merge(self, parts: Tensors) -> torch.Tensor:
        """Hugging Face tensors -> the full Megatron tensor."""

    def split(self, full: torch.Tensor) -> Tensors:
        """The full Megatron tensor -> Hugging Face tensors; inverse of `merge`."""

    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        """The part that tensor-parallel rank `rank` of `size` holds."""

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from all ranks' parts; inverse of `shard`."""


@dataclass(frozen=True, kw_only=True)
class Plain:
    """One tensor on both sides, cut along `partition_dim` (None: replicated). `hf_shape` reshapes on export."""

    partition_dim: int | None = None
    megatron_shape: tuple[int, ...] | None = None
    hf_shape: tuple[int, ...] | None = None

    def merge(self, parts: Tensors) -> torch.Tensor:
        (tensor,) = parts
        return tensor if self.megatron_shape is None else tensor.reshape(self.megatron_shape)

    def split(self, full: torch.Tensor) -> Tensors:
        return (full if self.hf_shape is None else full.reshape(self.hf_shape),)

    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return full if self.partition_dim is None else full.chunk(size, self.partition_dim)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return shards[0] if self.partition_dim is None else torch.cat(list(shards), self.partition_dim)


@dataclass(frozen=True, kw_only=True)
class GroupedQKV:
    """q, k, v (or one stacked qkv) <-> rows per key-value group: its queries, its key, its value. Column parallel."""

    groups: int
    head_dim: int
    stacked: bool = False  # Hugging Face keeps one [q; k; v] tensor (vision tower)

    def merge(self, parts: Tensors) -> torch.Tensor:
        q, k, v = parts[0].chunk(3) if self.stacked else parts
        grouped = [x.reshape(self.groups, -1, *x.shape[1:]) for x in (q, k, v)]
        return torch.cat(grouped, dim=1).reshape(-1, *q.shape[1:])

    def split(self, full: torch.Tensor) -> Tensors:
        trailing = full.shape[1:]
        rows = full.shape[0] // self.groups
        grouped = full.reshape(self.groups, rows, *trailing)
        q, k, v = grouped.split([rows - 2 * self.head_dim, self.head_dim, self.head_dim], dim=1)
        parts = tuple(x.reshape(-1, *trailing) for x in (q, k, v))
        return (torch.cat(parts),) if self.stacked else parts

    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return full.chunk(size)[rank]

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(shards))


@dataclass(frozen=True, kw_only=True)
class GatedMLP:
    """gate, up <-> [gate; up]. A rank holds its slice of gate followed by its slice of up."""

    def merge(self, parts: Tensors) -> torch.Tensor:
        return torch.cat(parts)

    def split(self, full: torch.Tensor) -> Tensors:
        return full.chunk(2)

    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([torch.cat([half[i] for half in halves]) for i in (0, 1)])


REPLICATED = Plain()
COLUMN = Plain(partition_dim=0)
ROW = Plain(partition_dim=1)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """`megatron` is the parameter's name with global layer numbers, as if there were one pipeline stage."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout


def global_name(model: torch.nn.Module, name: str) -> str:
    """Replace the stage-local layer number in a parameter name by the global one."""
    parts = name.split(".")
    if "layers" not in parts:
        return name
    at = parts.index("layers")
    block = model
    for attribute in parts[:at]:
        block = getattr(block, attribute)
    parts[at + 1] = str(block.layers[int(parts[at + 1])].layer_number - 1)  # type: ignore[union-attr,index]
    return ".".join(parts)
