"""The weights of a running model under their Hugging Face names, gathered to the main rank bucket by bucket.

For the weight push and for the export at the end of a stage. Parameters of one owner (a pipeline stage, an
expert-parallel rank) are packed, gathered over the owner's tensor-parallel group and sent to the main rank. While the
caller uses one bucket the next is already on its way; never more than two are in memory, whatever the model's size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import fp8_utils, parallel_state

from megatron_r1reward.model_folder.weight_table import Entry, WeightTable, global_name
from megatron_r1reward.models.base import chunks_of
from megatron_r1reward.parallel.setup import Topology
from megatron_r1reward.types import TensorMeta

BUCKET_BYTES = 64 << 20
MAIN_RANK = 0


@dataclass(frozen=True, kw_only=True)
class _Announcement:
    """A parameter as its owner holds it."""

    owner: int  # global rank: the first of the tensor-parallel group that holds the parameter
    shape: tuple[int, ...]  # of the local shard
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    entries: tuple[Entry, ...]
    owner: int
    is_expert: bool
    dtype: torch.dtype


@dataclass(kw_only=True)
class _InFlight:
    bucket: _Bucket
    work: Any = None  # the gathering on the owner's ranks, or the reception on the main rank
    shards: list[torch.Tensor] | None = None
    received: torch.Tensor | None = None


class WeightExporter:
    """Built once per model, on all ranks (collective); `metas` and the plan are then fixed.

    Args:
        model: this rank's chunk or chunks.
        table: the table under which the model was built.
        bucket_bytes: full tensors of one bucket; a larger tensor travels alone.
    """

    def __init__(
        self, model: torch.nn.Module, table: WeightTable, topology: Topology, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._topology = topology
        self._local = {
            global_name(chunk, name): parameter
            for chunk in chunks_of(model)
            for name, parameter in chunk.named_parameters()
        }
        self._groups = {
            False: parallel_state.get_tensor_model_parallel_group(),
            True: parallel_state.get_expert_tensor_parallel_group(),
        }
        self._leaders = {kind: dist.get_global_rank(group, 0) for kind, group in self._groups.items()}
        self._announced = self._announce(table)
        self._fulls = {entry.megatron: self._full(entry) for entry in table}  # without values: nothing is allocated
        self._buckets = list(self._plan(table, bucket_bytes))
        self.metas = self._metas(table)

    def _announce(self, table: WeightTable) -> dict[str, _Announcement]:
        """Every parameter's owner. Only the first data-parallel replica of each part speaks: few, small messages."""
        first = {
            False: parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0,
            True: parallel_state.get_expert_data_parallel_rank() == 0,
        }
        mine = {}
        for entry in table:
            kind = entry.expert is not None
            parameter = self._local.get(entry.megatron)
            if parameter is not None and first[kind] and self._leaders[kind] == self._topology.rank:
                mine[entry.megatron] = _Announcement(
                    owner=self._topology.rank, shape=tuple(parameter.shape), dtype=parameter.dtype
                )
        everyone: list[dict[str, _Announcement]] = [mine]
        if self._topology.world_size > 1:
            everyone = [{}] * self._topology.world_size
            dist.all_gather_object(everyone, mine)
        announced: dict[str, _Announcement] = {}
        for part in everyone:
            announced = part | announced  # of two owners the lower rank
        missing = [entry.megatron for entry in table if entry.megatron not in announced]
        assert not missing, f"no rank holds {missing[:5]}"
        return announced

    def _full(self, entry: Entry) -> torch.Tensor:
        """The full Megatron tensor without values."""
        local = torch.empty(self._announced[entry.megatron].shape, device="meta")
        size = self._groups[entry.expert is not None].size()
        return entry.layout.unshard([local] * size) if size > 1 else local

    def _plan(self, table: WeightTable, bucket_bytes: int) -> Iterator[_Bucket]:
        pending: list[Entry] = []
        key: tuple[int, bool, torch.dtype] | None = None
        size = 0
        for entry in table:
            announced = self._announced[entry.megatron]
            ours = (announced.owner, entry.expert is not None, announced.dtype)
            num_bytes = self._fulls[entry.megatron].numel() * announced.dtype.itemsize
            if key is not None and (ours != key or size + num_bytes > bucket_bytes):
                yield _Bucket(entries=tuple(pending), owner=key[0], is_expert=key[1], dtype=key[2])
                pending, size = [], 0
            key = ours
            pending.append(entry)
            size += num_bytes
        if key is not None:
            yield _Bucket(entries=tuple(pending), owner=key[0], is_expert=key[1], dtype=key[2])

    def _metas(self, table: WeightTable) -> list[TensorMeta]:
        experts: dict[str, int] = {}
        found: dict[str, TensorMeta] = {}
        for entry in table:
            dtype = str(self._announced[entry.megatron].dtype).removeprefix("torch.")
            for name, part in zip(entry.hf, entry.layout.split(self._fulls[entry.megatron]), strict=True):
                experts[name] = experts.get(name, 0) + 1
                shape = (experts[name], *part.shape) if entry.stacked else tuple(part.shape)
                found[name] = TensorMeta(name=name, dtype=dtype, shape=shape)
        return [found[name] for name in table.hf_names]

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors in the order of `metas` on the main rank, nothing on the others, which must iterate too."""
        flying: deque[_InFlight] = deque()
        sends: deque[tuple[Any, torch.Tensor]] = deque()
        stacks: dict[str, list[torch.Tensor]] = {}
        experts = {meta.name: meta.shape[0] if meta.shape else 0 for meta in self.metas}
        for bucket in [*self._buckets, None]:
            if bucket is not None:
                flying.append(self._start(bucket))
            while flying and (bucket is None or len(flying) > 1):
                for entry, full in self._finish(flying.popleft(), sends):
                    for name, part in zip(entry.hf, entry.layout.split(full), strict=True):
                        if not entry.stacked:
                            yield name, part
                            continue
                        stacks.setdefault(name, []).append(part)
                        if len(stacks[name]) == experts[name]:
                            yield name, torch.stack(stacks.pop(name))
        for work, _ in sends:
            work.wait()
        assert not stacks, f"experts are missing: {sorted(stacks)}"

    def _start(self, bucket: _Bucket) -> _InFlight:
        """Begin the gathering where this rank takes part in it, or the reception on the main rank."""
        flight = _InFlight(bucket=bucket)
        group = self._groups[bucket.is_expert]
        if bucket.owner == self._leaders[bucket.is_expert]:
            if group.size() > 1:
                flat = torch.cat([_values(self._local[entry.megatron]).reshape(-1) for entry in bucket.entries])
                flight.shards = [torch.empty_like(flat) for _ in range(group.size())]
                flight.work = dist.all_gather(flight.shards, flat, group=group, async_op=True)
        elif self._topology.rank == MAIN_RANK:
            size = sum(self._fulls[entry.megatron].numel() for entry in bucket.entries)
            flight.received = torch.empty(size, dtype=bucket.dtype, device=self._topology.device)
            flight.work = dist.irecv(flight.received, src=bucket.owner)
        return flight

    def _finish(
        self, flight: _InFlight, sends: deque[tuple[Any, torch.Tensor]]
    ) -> Sequence[tuple[Entry, torch.Tensor]]:
        """The bucket's full tensors on the main rank; the owner sends them, the others are done."""
        bucket, rank = flight.bucket, self._topology.rank
        if flight.work is not None:
            flight.work.wait()
        if rank not in (bucket.owner, MAIN_RANK):
            return ()
        if rank == MAIN_RANK and bucket.owner != MAIN_RANK:
            assert flight.received is not None
            fulls = [self._fulls[entry.megatron] for entry in bucket.entries]
            flat = flight.received.split([full.numel() for full in fulls])
            return [(e, x.view(f.shape)) for e, x, f in zip(bucket.entries, flat, fulls, strict=True)]
        full_tensors = self._unshard(flight)
        if rank == MAIN_RANK:
            return list(zip(bucket.entries, full_tensors, strict=True))
        packed = torch.cat([full.reshape(-1) for full in full_tensors])
        sends.append((dist.isend(packed, dst=MAIN_RANK), packed))
        while len(sends) > 1:
            sends.popleft()[0].wait()
        return ()

    def _unshard(self, flight: _InFlight) -> list[torch.Tensor]:
        entries = flight.bucket.entries
        local = [_values(self._local[entry.megatron]) for entry in entries]
        if flight.shards is None:
            return local
        sizes = [x.numel() for x in local]
        pieces = zip(*(shard.split(sizes) for shard in flight.shards), strict=True)
        return [
            entry.layout.unshard([piece.view(x.shape) for piece in parts])
            for entry, x, parts in zip(entries, local, pieces, strict=True)
        ]


def _values(parameter: torch.Tensor) -> torch.Tensor:
    """The numbers of a parameter; of an FP8 parameter (`precision.fp8_param_gather`) in the dtype that it says."""
    values = parameter.detach()
    return fp8_utils.dequantize_fp8_tensor(values) if fp8_utils.is_float8tensor(values) else values


def export_hf_tensors(
    model: torch.nn.Module, table: WeightTable, topology: Topology
) -> Iterator[tuple[str, torch.Tensor]]:
    """Full tensors under their Hugging Face names, in table order, on the main rank; see `WeightExporter`."""
    yield from WeightExporter(model, table, topology).tensors()
