"""Weight tables: how Hugging Face tensors and megatron-core parameters correspond.

A family is one `WeightTable`. It drives the import, the export, the weight push, the offline converter and its
verification; nothing else in the package knows how a weight is laid out.

Adding a family
---------------
1. Write `model_folder/table_<family>.py` with `weight_table(shape) -> WeightTable`, and name it in `TABLES` of
   `model_folder/folder_weights.py` under the configuration's `model_type`.
2. One `Entry` per Megatron parameter, named as in a model on ONE rank: layer numbers and expert numbers are global
   (`...decoder.layers.7.mlp.local_experts.93.linear_fc1.weight`). `hf` lists the tensors on disk it is made of, each
   with the shape that follows from the configuration: a folder with another shape is refused.
3. Choose the layout: `REPLICATED` (norms, router, q/k norms, position embeddings), `COLUMN`, `ROW`, `GroupedQKV`,
   `GatedMLP`, `Vocabulary`. `Plain(hf_shape=..., megatron_shape=...)` reshapes (patch embedding).
4. Experts: set `expert` to the global expert number. Published folders either have one tensor per expert (then `hf`
   names those) or stack all experts of a layer along dim 0 (then `hf` names the stacked tensor in every one of the
   layer's entries, with `stacked=True`). Where each element is stored [in, out], give `Plain` or `GatedMLP`
   `transposed=True`; where gate and up are one tensor, `GatedMLP(fused=True)`. Keep the entries of one stacked tensor
   next to each other: export assembles it from them.
5. Set `saved_as` where the distributed checkpoint has another name than the module (norms that Transformer Engine fuses
   into the next linear: `sharded_state_dict_keys_map` of the layer spec).
6. Tied embeddings: one `Tie`, and no entry for the head.

`WeightTable` checks on construction that no Megatron name and no Hugging Face element occurs twice. The tests of
`tests/parallel/test_checkpoint_layouts.py` compare the table with the model's own `sharded_state_dict`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # only layouts with values need it, and it takes seconds to import
    import torch

SCORE = "language_model.output_layer.score."  # parameters of a scalar head, in the place of the LM head
Shape: TypeAlias = tuple[int, ...]
Tensors: TypeAlias = "tuple[torch.Tensor, ...]"
Views: TypeAlias = "list[torch.Tensor]"


class Layout(ABC):
    """How the Hugging Face tensors of one entry make its Megatron tensor, and how ranks share that.

    Both directions are given as views along dim 0, so that a converter can copy them to a file one after another
    without building the result in memory.
    """

    @abstractmethod
    def merge_views(self, parts: Tensors) -> Views:
        """Hugging Face tensors -> pieces whose concatenation along dim 0 is the full Megatron tensor."""

    @abstractmethod
    def split_views(self, full: torch.Tensor) -> list[Views]:
        """The full Megatron tensor -> for each Hugging Face tensor, the pieces that it is the concatenation of."""

    @abstractmethod
    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        """The part that tensor-parallel rank `rank` of `size` holds."""

    @abstractmethod
    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from all ranks' parts; inverse of `shard`."""

    def merge(self, parts: Tensors) -> torch.Tensor:
        """Hugging Face tensors -> the full Megatron tensor."""
        return _join(self.merge_views(parts))

    def split(self, full: torch.Tensor) -> Tensors:
        """The full Megatron tensor -> Hugging Face tensors; inverse of `merge`."""
        return tuple(_join(views) for views in self.split_views(full))


def _join(views: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    import torch

    return views[0] if len(views) == 1 else torch.cat(list(views), dim)


def _cut(full: torch.Tensor, size: int, rank: int, dim: int) -> torch.Tensor:
    if full.shape[dim] % size:
        raise ValueError(f"dimension {dim} of {tuple(full.shape)} does not divide by tensor-parallel size {size}")
    return full.chunk(size, dim)[rank]


@dataclass(frozen=True, kw_only=True)
class Plain(Layout):
    """One tensor on both sides, cut along `partition_dim` of the Megatron tensor (None: replicated).

    `hf_shape` and `megatron_shape` reshape; `transposed` means that Hugging Face stores [in, out].
    """

    partition_dim: int | None = None
    megatron_shape: tuple[int, ...] | None = None
    hf_shape: tuple[int, ...] | None = None
    transposed: bool = False

    def merge_views(self, parts: Tensors) -> Views:
        (tensor,) = parts
        tensor = tensor.T if self.transposed else tensor
        return [tensor if self.megatron_shape is None else tensor.reshape(self.megatron_shape)]

    def split_views(self, full: torch.Tensor) -> list[Views]:
        tensor = full if self.hf_shape is None else full.reshape(self.hf_shape)
        return [[tensor.T if self.transposed else tensor]]

    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return full if self.partition_dim is None else _cut(full, size, rank, self.partition_dim)

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return shards[0] if self.partition_dim is None else _join(shards, self.partition_dim)


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Layout):
    """Embedding or LM head with `rows` rows. Ranks hold equal parts; the last ones end in zero rows where `rows` does
    not divide, and export drops those again."""

    rows: int

    def merge_views(self, parts: Tensors) -> Views:
        return list(parts)

    def split_views(self, full: torch.Tensor) -> list[Views]:
        return [[full[: self.rows]]]

    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        local = -(-self.rows // size)
        part = full[rank * local : (rank + 1) * local]
        missing = local - part.shape[0]
        return _join([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return _join(shards)[: self.rows]


@dataclass(frozen=True, kw_only=True)
class GroupedQKV(Layout):
    """q, k, v (or one stacked qkv) <-> rows per key-value group: its queries, its key, its value. Column parallel."""

    groups: int
    head_dim: int
    stacked: bool = False  # Hugging Face keeps one [q; k; v] tensor (vision tower)

    def merge_views(self, parts: Tensors) -> Views:
        q, k, v = parts[0].chunk(3) if self.stacked else parts
        return [rows for group in zip(*(x.chunk(self.groups) for x in (q, k, v)), strict=True) for rows in group]

    def split_views(self, full: torch.Tensor) -> list[Views]:
        rows = full.shape[0] // self.groups
        sizes = [rows - 2 * self.head_dim, self.head_dim, self.head_dim]
        q, k, v = (list(x) for x in zip(*(group.split(sizes) for group in full.chunk(self.groups)), strict=True))
        return [[*q, *k, *v]] if self.stacked else [q, k, v]

    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return _cut(full, size, rank, 0)

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        return _join(shards)


@dataclass(frozen=True, kw_only=True)
class GatedMLP(Layout):
    """gate, up <-> [gate; up]. A rank holds its slice of gate followed by its slice of up.

    `fused`: Hugging Face keeps one [gate; up] tensor; `transposed`: it stores [in, out], so fused it is [in, 2 * out].
    """

    fused: bool = False
    transposed: bool = False

    def merge_views(self, parts: Tensors) -> Views:
        return [part.T if self.transposed else part for part in parts]

    def split_views(self, full: torch.Tensor) -> list[Views]:
        halves = (full,) if self.fused else full.chunk(2)
        return [[half.T if self.transposed else half] for half in halves]

    def shard(self, full: torch.Tensor, size: int, rank: int) -> torch.Tensor:
        return _join([_cut(half, size, rank, 0) for half in full.chunk(2)])

    def unshard(self, shards: Sequence[torch.Tensor]) -> torch.Tensor:
        halves = [shard.chunk(2) for shard in shards]
        return _join([half[i] for i in (0, 1) for half in halves])


REPLICATED = Plain()
COLUMN = Plain(partition_dim=0)
ROW = Plain(partition_dim=1)
GATED = GatedMLP()


@dataclass(frozen=True, kw_only=True)
class CheckpointKey:
    """Where a parameter is in a distributed checkpoint: at `index` of the leading (layer, expert) axes of `key`."""

    key: str
    index: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One Megatron parameter. `megatron` has global layer and expert numbers, as if there were one rank."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of the tensors `hf` on the disk
    layout: Layout
    expert: int | None = None  # global expert number; the layout's tensor parallelism is then the experts' own
    stacked: bool = False  # the Hugging Face tensors hold all experts along dim 0; this entry is element `expert`
    saved_as: str | None = None  # name in distributed checkpoints, where it is not `megatron`

    def hf_part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This entry's part of one of its Hugging Face tensors, a view."""
        return tensor[self.expert] if self.stacked else tensor


def one_to_one(megatron: str, hf: str, shape: Shape, layout: Layout = REPLICATED) -> Entry:
    """The entry of a parameter that is one tensor on the disk, of this shape."""
    return Entry(megatron=megatron, hf=(hf,), shapes=(shape,), layout=layout)


@dataclass(frozen=True, kw_only=True)
class Tie:
    """The LM head is the embedding. `megatron` is the last stage's copy, `hf` the redundant tensor that a folder may
    hold; both equal entry `to`."""

    to: str
    megatron: str
    hf: str


@dataclass(frozen=True, kw_only=True)
class WeightTable:
    """All weights of one model, each exactly once.

    `spellings` are (prefix on disk, prefix in the table): folders written by other library versions.
    `separate_layers` are prefixes of blocks whose layers differ (e.g. dense and MoE mixed): megatron-core then saves
    each layer under its own number instead of stacking them.

    Raises:
        ValueError: a name or element is described twice.
    """

    entries: tuple[Entry, ...]
    tie: Tie | None = None
    spellings: tuple[tuple[str, str], ...] = ()
    separate_layers: tuple[str, ...] = ()
    by_megatron: dict[str, Entry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_megatron = {entry.megatron: entry for entry in self.entries}
        consumed = [(name, e.expert if e.stacked else None) for e in self.entries for name in e.hf]
        assert all(len(entry.hf) == len(entry.shapes) for entry in self.entries)
        if len(by_megatron) != len(self.entries) or len(set(consumed)) != len(consumed):
            raise ValueError("the weight table describes a tensor twice")
        if self.tie is not None:
            by_megatron[self.tie.megatron] = by_megatron[self.tie.to]
        object.__setattr__(self, "by_megatron", by_megatron)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def hf_names(self) -> list[str]:
        """Every Hugging Face tensor once, in table order."""
        return list(self.hf_shapes)

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Name and shape of every Hugging Face tensor, in table order."""
        return {name: shape for entry in self.entries for name, shape in zip(entry.hf, entry.shapes, strict=True)}

    def checkpoint_key(self, entry: Entry) -> CheckpointKey:
        """Where the entry is in a distributed checkpoint. megatron-core stacks the layers of a block, and the experts
        of a layer, along leading axes of one tensor."""
        name = entry.saved_as or entry.megatron
        stacks = [r"\.(local_experts)\.(\d+)\."]
        if not name.startswith(self.separate_layers):
            stacks.insert(0, r"\.(layers)\.(\d+)\.")
        index = []
        for stack in stacks:
            if (found := re.search(stack, name)) is not None:
                index.append(int(found[2]))
                name = f"{name[: found.start()]}.{found[1].removeprefix('local_')}.{name[found.end() :]}"
        return CheckpointKey(key=name, index=tuple(index))

    def canonical(self, name: str) -> str:
        """The table's spelling of a name found on disk."""
        for on_disk, ours in self.spellings:
            if name.startswith(on_disk):
                return ours + name.removeprefix(on_disk)
        return name


def score_entries(hidden: int, layers: int) -> list[Entry]:
    """The scalar head of `layers` layers, whole on every rank: `score.weight` as transformers' sequence classifiers
    and vLLM's adapter for them name it; two layers as in Qwen2.5-Math-RM (linear, ReLU, linear, with biases)."""
    shapes: dict[str, Shape] = {"weight": (1, hidden)}
    if layers == 2:
        shapes = {"0.weight": (hidden, hidden), "0.bias": (hidden,), "2.weight": (1, hidden), "2.bias": (1,)}
    return [one_to_one(f"{SCORE}{name}", f"score.{name}", shape) for name, shape in shapes.items()]


def global_name(model: torch.nn.Module, name: str) -> str:
    """A parameter's name on this rank -> the name in the table.

    Replaces the stage-local layer number and the rank-local expert number by the global ones; grouped experts
    (`experts.linear_fc1.weight3`) get the name that sequential experts have.
    """
    parts = name.split(".")
    module: Any = model
    for at, part in enumerate(parts[:-1]):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
        if at > 0 and parts[at - 1] == "layers":
            parts[at] = str(module.layer_number - 1)
        if part == "experts" and hasattr(module, "num_local_experts"):
            parts[at + 1 :] = _global_expert(module, parts[at + 1 :])
            break
    return ".".join(parts)


def _global_expert(experts: Any, parts: list[str]) -> list[str]:
    """The rest of a parameter's name below `experts`, with the global expert number."""
    first = experts.ep_group.rank() * experts.num_local_experts
    if parts[0] == "local_experts":
        return ["local_experts", str(first + int(parts[1])), *parts[2:]]
    grouped = re.fullmatch(r"(weight|bias)(\d+)", parts[-1])
    assert grouped is not None, parts
    return ["local_experts", str(first + int(grouped[2])), *parts[:-1], grouped[1]]


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
