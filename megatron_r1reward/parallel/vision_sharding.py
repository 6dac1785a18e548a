"""How the ranks of a model replica share the vision tower.

"tensor_parallel": weights are cut over the tensor-parallel ranks, every rank sees every image.
"image_sharded": every rank holds the whole tower and encodes some of the images; embeddings are gathered over the
tensor x context ranks. No communication inside the tower, no head or feed-forward size to divide, and with context
parallelism each image is encoded once instead of once per context rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_r1reward.config.schema import ParallelSection
from megatron_r1reward.parallel.context import assign_images, gather_rows
from megatron_r1reward.parallel.setup import Topology


class Tower(Protocol):
    """A vision tower: `encode` is for the images of one rank."""

    def encode(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, kw_only=True)
class VisionSharding:
    """`groups` are the process groups that the tower's layers are built with. `run_without_images`: overlapped
    communication expects every parameter in every micro-batch, so a text-only one encodes a blank image whose result
    counts zero times."""

    groups: ProcessGroupCollection
    image_sharded: bool
    run_without_images: bool
    tensor_parallel: dist.ProcessGroup
    context_parallel: dist.ProcessGroup
    both: dist.ProcessGroup  # tensor x context

    def mark(self, tower: torch.nn.Module) -> None:
        """Whole weights on every rank count once in the gradient norm."""
        if self.image_sharded:
            for parameter in tower.parameters():
                parameter.tensor_model_parallel = False  # type: ignore[attr-defined]

    def sharded_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """Whole weights on every tensor-parallel rank are replicas of one another in a checkpoint."""
        if self.image_sharded:
            rank = self.tensor_parallel.rank()
            for item in state.values():
                if isinstance(item, ShardedTensor | ShardedObject | ShardedTensorFactory):
                    item.replica_id = (0, rank, item.replica_id[-1])
        return state

    def encode(
        self, tower: Tower, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, *, unit: int
    ) -> torch.Tensor:
        """Embeddings of all images, in their order: [P, patch_dim], [I, 3] (on the CPU) -> [P / unit, H]."""
        if not self.image_sharded or self.both.size() == 1:
            return tower.encode(pixel_values, image_grid_thw)
        patches = image_grid_thw.prod(dim=1).tolist()
        owned = assign_images(patches, self.both.size())
        mine = owned[self.both.rank()]
        by_image = pixel_values.split(patches)
        if mine:
            rows = tower.encode(torch.cat([by_image[i] for i in mine]), image_grid_thw[mine])
        else:
            # No rows, but connected to the parameters: the gather's backward is a collective, so it has to run here.
            rows = self.blank(tower, pixel_values.shape[1], unit=unit, like=pixel_values)[:0]
        counts = [sum(patches[i] for i in images) // unit for images in owned]
        gathered = gather_rows(rows, counts, group=self.both, context=self.context_parallel)
        arrived = [image for images in owned for image in images]
        by_arrival = gathered.split([patches[i] // unit for i in arrived])
        place = {image: k for k, image in enumerate(arrived)}
        return torch.cat([by_arrival[place[image]] for image in range(len(patches))])

    def blank(self, tower: Tower, patch_dim: int, *, unit: int, like: torch.Tensor) -> torch.Tensor:
        """Embedding [1, H] of the smallest image, all black: it reaches every parameter of the tower."""
        side = math.isqrt(unit)
        grid = torch.tensor([[1, side, side]])
        return tower.encode(like.new_zeros(unit, patch_dim, dtype=torch.float32), grid)


def vision_sharding(parallel: ParallelSection, topology: Topology) -> VisionSharding:
    """The sharing that the run file asks for; the tower takes part in no pipeline and no context parallelism."""
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
    tensor_parallel = groups.tp
    image_sharded = parallel.vision == "image_sharded"
    if image_sharded:
        groups.tp = topology.solo
    groups.cp = groups.pp = topology.solo
    return VisionSharding(
        groups=groups,
        image_sharded=image_sharded,
        run_without_images=parallel.overlap_grad_reduce or parallel.overlap_param_gather,
        tensor_parallel=tensor_parallel,
        context_parallel=parallel_state.get_context_parallel_group(),
        both=parallel_state.get_tensor_and_context_parallel_group(),
    )
