"""The Qwen3-VL vision tower from megatron-core transformer blocks.

All blocks attend within a frame. Learned position embeddings of a square grid are resampled to each image's grid.
Besides the final features, the outputs of a few inner blocks go through mergers of their own: the deepstack features,
which the first decoder layers of the language model add to their outputs.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_r1reward.models.qwen3_vl.config import ModelConfigs
from megatron_r1reward.parallel.setup import Topology, to_device
from megatron_r1reward.parallel.specs import PackedRow, TorchNorm, final_norm, layer_spec, packed
from megatron_r1reward.parallel.vision_sharding import vision_sharding

ROTARY_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class PatchLayout:
    """Where the patches of a batch of images are, in the order in which the image processor writes them: grouped by
    merge unit (m x m)."""

    positions: torch.Tensor  # int64 [P, 2]: row, column
    frame_bounds: tuple[int, ...]  # frames + 1, in patches
    table_rows: torch.Tensor  # int64 [P, 4]: the four entries of the position table around a patch
    table_weights: torch.Tensor  # float32 [P, 4]: their bilinear weights


def patch_layout(image_grid_thw: torch.Tensor, *, merge_size: int, table_side: int) -> PatchLayout:
    """Lay out the patches of images with grids `image_grid_thw` [I, 3] (frames, rows, columns of patches)."""
    m = merge_size
    positions, frames_of, rows_of, weights_of = [], [], [], []
    for frames, rows, columns in image_grid_thw.tolist():
        row = torch.arange(rows)[:, None].expand(rows, columns)
        column = torch.arange(columns)[None].expand(rows, columns)
        by_unit = [x.reshape(rows // m, m, columns // m, m).transpose(1, 2).flatten() for x in (row, column)]
        # Corners align: the first and last patch of an axis sit on the first and last entry of the table.
        low, high, share = zip(
            *(_between(axis, size, table_side) for axis, size in zip(by_unit, (rows, columns), strict=True)),
            strict=True,
        )
        corners = [(r, c) for r in (0, 1) for c in (0, 1)]
        at, weight = (low, high), tuple((1 - s, s) for s in share)
        table_rows = torch.stack([at[r][0] * table_side + at[c][1] for r, c in corners], dim=-1)
        table_weights = torch.stack([weight[0][r] * weight[1][c] for r, c in corners], dim=-1)
        positions.append(torch.stack(by_unit, dim=-1).repeat(frames, 1))
        rows_of.append(table_rows.repeat(frames, 1))
        weights_of.append(table_weights.repeat(frames, 1))
        frames_of += [rows * columns] * frames
    return PatchLayout(
        positions=torch.cat(positions),
        frame_bounds=tuple(itertools.accumulate(frames_of, initial=0)),
        table_rows=torch.cat(rows_of),
        table_weights=torch.cat(weights_of),
    )


def _between(index: torch.Tensor, size: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entries below and above position `index` of `size` on an axis of `side` entries, and the upper one's share."""
    exact = index.float() * (side - 1) / max(size - 1, 1)
    low = exact.floor().long()
    return low, (low + 1).clamp(max=side - 1), exact - low


@dataclass
class TowerRow(PackedRow):
    """Frame bounds, and the number of patches: rows beyond it are tapped features that pass through."""

    patches: int = 0


class TapLayer(TransformerLayer):
    """A block whose output can be tapped. Taps travel as further rows below the hidden states, so that they survive
    activation recomputation, which knows hidden states only."""

    def __init__(self, *args: Any, tap: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tap = tap

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        patches = kwargs["packed_seq_params"].patches
        tapped = hidden_states[patches:]
        output, context = super().forward(hidden_states[:patches], *args, **kwargs)
        if self.tap:
            tapped = torch.cat([tapped, output])
        return (torch.cat([output, tapped]) if tapped.shape[0] else output), context


class PatchMerger(MegatronModule):
    """LayerNorm and a two-layer MLP from m x m patches to one language-model embedding."""

    def __init__(self, configs: ModelConfigs, *, norm_after_merge: bool, groups: ProcessGroupCollection) -> None:
        super().__init__(config=configs.merger)
        vision = configs.hf.vision_config
        self.width = vision.hidden_size * vision.spatial_merge_size**2
        self.norm = TorchNorm(configs.merger, self.width if norm_after_merge else vision.hidden_size, eps=1e-6)
        self.mlp = MultimodalProjector(
            configs.merger,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            "mlp",
            input_size=self.width,
            tp_group=groups.tp,
        )
        self.norm_after_merge = norm_after_merge

    def forward(self, hidden_PH: torch.Tensor) -> torch.Tensor:
        if self.norm_after_merge:
            return self.mlp(self.norm(hidden_PH.reshape(-1, self.width)))
        return self.mlp(self.norm(hidden_PH).reshape(-1, self.width))


class PatchMergers(torch.nn.ModuleList):
    """Mergers whose checkpoint entries know how they are cut; megatron-core takes the parameters of a plain list for
    copies of one another."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {
            name: item
            for number, merger in enumerate(self)
            for name, item in merger.sharded_state_dict(f"{prefix}{number}.", sharded_offsets, metadata).items()  # type: ignore[operator]
        }


class VisionTower(VisionModule):
    """Pixels to features: [P, patch_dim] and [I, 3] -> [M, 1 + K, hidden], M = P / merge_size^2: the embeddings that
    replace image tokens, then the K deepstack levels."""

    def __init__(self, configs: ModelConfigs, topology: Topology) -> None:
        super().__init__(config=configs.vision)
        vision = configs.hf.vision_config
        self.vision = vision
        dtype = configs.vision.params_dtype
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.patch_embed = torch.nn.Linear(patch_dim, vision.hidden_size, dtype=dtype, device=topology.device)
        self.pos_embed = torch.nn.Embedding(
            vision.num_position_embeddings, vision.hidden_size, dtype=dtype, device=topology.device
        )
        self.table_side = round(vision.num_position_embeddings**0.5)
        self.unit = vision.spatial_merge_size**2
        self.sharding = vision_sharding(configs.parallel, topology)
        groups, impl = self.sharding.groups, configs.transformer_impl
        self.decoder = TransformerBlock(
            configs.vision,
            TransformerBlockSubmodules(
                layer_specs=[_block_spec(i in vision.deepstack_visual_indexes, impl) for i in range(vision.depth)],
                layer_norm=final_norm(impl),
            ),
            pre_process=True,
            post_process=True,
            post_layer_norm=False,  # every merger has a norm of its own
            pg_collection=groups,
        )
        self.merger = PatchMerger(configs, norm_after_merge=False, groups=groups)
        self.deepstack_mergers = PatchMergers(
            PatchMerger(configs, norm_after_merge=True, groups=groups) for _ in vision.deepstack_visual_indexes
        )
        quarter = vision.hidden_size // vision.num_heads // 2
        exponent = torch.arange(0, quarter, 2, dtype=torch.float32) / quarter
        self.register_buffer("inverse_frequency", 1.0 / ROTARY_BASE**exponent, persistent=False)
        self.sharding.mark(self)

    def merger_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters between tower and language model."""
        return [*self.merger.parameters(), *self.deepstack_mergers.parameters()]

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        self.decoder.set_input_tensor(input_tensor)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return self.sharding.sharded_state_dict(super().sharded_state_dict(prefix, sharded_offsets, metadata))

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Every image of a micro-batch on every rank, however the work is shared out."""
        rows = self.sharding.encode(self, pixel_values, image_grid_thw, unit=self.unit)
        return rows.unflatten(1, (1 + len(self.deepstack_mergers), -1))

    def nothing(self) -> torch.Tensor:
        """Zero, through every parameter of the tower."""
        weight = self.patch_embed.weight
        return self.sharding.blank(self, weight.shape[1], unit=self.unit, like=weight).sum() * 0.0

    def encode(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """The images given, on this rank's part of the tower: [M, (1 + K) * hidden]."""
        device, patches = pixel_values.device, pixel_values.shape[0]
        layout = patch_layout(image_grid_thw, merge_size=self.vision.spatial_merge_size, table_side=self.table_side)
        table_PKH = self.pos_embed(to_device(layout.table_rows, device))
        table_PKH = table_PKH * to_device(layout.table_weights, device)[..., None]
        hidden_PH = self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype))
        hidden_PH = hidden_PH + table_PKH.sum(1).to(hidden_PH.dtype)
        angles = (to_device(layout.positions, device)[..., None].float() * self.inverse_frequency).flatten(1)
        bounds = to_device(torch.tensor(layout.frame_bounds, dtype=torch.int32), device)
        frames = packed(bounds, layout.frame_bounds)
        output = self.decoder(
            hidden_states=hidden_PH[:, None],
            attention_mask=None,
            rotary_pos_emb=torch.cat([angles, angles], dim=-1)[:, None, None],
            packed_seq_params=TowerRow(**vars(frames), patches=patches),
        )
        final, *taps = output[:, 0].split(patches)
        # Decoder layers take the features in the order of the blocks; merger i belongs to the i-th block listed.
        listed = list(self.vision.deepstack_visual_indexes)
        levels = [
            self.deepstack_mergers[listed.index(block)](tapped)
            for block, tapped in zip(sorted(listed), taps, strict=True)
        ]
        return torch.cat([self.merger(final), *levels], dim=1)


def _block_spec(tap: bool, transformer_impl: str) -> ModuleSpec:
    spec = layer_spec(AttnMaskType.no_mask, transformer_impl=transformer_impl)
    spec.module = TapLayer
    spec.params = {"tap": tap}
    return spec
