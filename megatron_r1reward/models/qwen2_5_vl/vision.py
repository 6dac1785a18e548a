"""The Qwen2.5-VL vision tower from megatron-core transformer blocks.

Patches are reordered so that every attention window is contiguous; windowed blocks attend within windows and
full-attention blocks within frames, both as packed sequences over the same order. The patch merger is megatron-core's
`MultimodalProjector`; the block's final norm is the merger's `ln_q`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.vision_module.vision_module import VisionModule
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules

from megatron_r1reward.models.qwen2_5_vl.config import ModelConfigs
from megatron_r1reward.parallel.setup import Topology, to_device
from megatron_r1reward.parallel.specs import PackedRow, PackedSelfAttention, final_norm, layer_spec, packed
from megatron_r1reward.parallel.vision_sharding import vision_sharding

ROTARY_BASE = 10_000.0


@dataclass
class WindowedRow(PackedRow):
    """Window bounds for windowed blocks; `frames` holds the bounds for full-attention blocks."""

    frames: PackedRow | None = None


class FrameSelfAttention(PackedSelfAttention):
    """Self-attention of a full-attention block: attends within frames instead of windows."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        return super().forward(
            hidden_states, attention_mask, *args, packed_seq_params=packed_seq_params.frames, **kwargs
        )


@dataclass(frozen=True, kw_only=True)
class PatchLayout:
    """Order and positions of the patches of a batch of images, P patches = M merge units of m^2 patches.

    Row and column index positions; `window_order[k]` is the merge unit that comes k-th in window order.
    """

    positions: torch.Tensor  # int64 [P, 2]
    window_order: torch.Tensor  # int64 [M]
    window_bounds: tuple[int, ...]  # windows + 1, in patches
    frame_bounds: tuple[int, ...]  # frames + 1, in patches


def patch_layout(image_grid_thw: torch.Tensor, *, merge_size: int, window_size: int, patch_size: int) -> PatchLayout:
    """Lay out the patches of images with grids `image_grid_thw` [I, 3] (frames, rows, columns of patches).

    Patches arrive grouped by merge unit (m x m), as the image processor writes them. Ragged windows at the right and
    lower edge are simply smaller, which equals the padded construction upstream. Within a frame windows of one size
    stand next to each other: attention is one call for each such run.
    """
    m = merge_size
    window = window_size // merge_size // patch_size
    positions, order, window_bounds, frame_bounds, first_unit = [], [], [0], [0], 0
    for frames, rows, columns in image_grid_thw.tolist():
        row = torch.arange(rows)[:, None].expand(rows, columns)
        column = torch.arange(columns)[None].expand(rows, columns)
        by_unit = [x.reshape(rows // m, m, columns // m, m).transpose(1, 2).flatten() for x in (row, column)]
        positions.append(torch.stack(by_unit, dim=-1).repeat(frames, 1))
        unit_rows, unit_columns = rows // m, columns // m
        units = torch.arange(frames * unit_rows * unit_columns).reshape(frames, unit_rows, unit_columns) + first_unit
        for frame in units:
            frame_bounds.append(frame_bounds[-1] + rows * columns)
            blocks = [
                frame[top : top + window, left : left + window].flatten()
                for top in range(0, unit_rows, window)
                for left in range(0, unit_columns, window)
            ]
            for block in sorted(blocks, key=lambda block: -block.numel()):
                order.append(block)
                window_bounds.append(window_bounds[-1] + block.numel() * m * m)
        first_unit += units.numel()
    return PatchLayout(
        positions=torch.cat(positions),
        window_order=torch.cat(order),
        window_bounds=tuple(window_bounds),
        frame_bounds=tuple(frame_bounds),
    )


def _packed_on(device: torch.device, bounds: tuple[int, ...]) -> PackedRow:
    return packed(to_device(torch.tensor(bounds, dtype=torch.int32), device), bounds)


class VisionTower(VisionModule):
    """Pixels to language-model embeddings: [P, patch_dim] and [I, 3] -> [M, hidden] with M = P / merge_size^2."""

    def __init__(self, configs: ModelConfigs, topology: Topology) -> None:
        super().__init__(config=configs.vision)
        vision = configs.hf.vision_config
        self.vision = vision
        self.unit = vision.spatial_merge_size**2
        patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.patch_embed = torch.nn.Linear(
            patch_dim, vision.hidden_size, bias=False, dtype=configs.vision.params_dtype, device=topology.device
        )
        self.sharding = vision_sharding(configs.parallel, topology)
        groups = self.sharding.groups
        impl = configs.transformer_impl
        windowed = layer_spec(AttnMaskType.no_mask, transformer_impl=impl)
        full = layer_spec(AttnMaskType.no_mask, self_attention=FrameSelfAttention, transformer_impl=impl)
        self.decoder = TransformerBlock(
            configs.vision,
            TransformerBlockSubmodules(
                layer_specs=[full if i in vision.fullatt_block_indexes else windowed for i in range(vision.depth)],
                layer_norm=final_norm(impl),
            ),
            pre_process=True,
            post_process=True,
            post_layer_norm=True,
            pg_collection=groups,
        )
        self.merger = MultimodalProjector(
            configs.merger,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            "mlp",
            input_size=vision.hidden_size * self.unit,
            tp_group=groups.tp,
        )
        quarter = vision.hidden_size // vision.num_heads // 2
        exponent = torch.arange(0, quarter, 2, dtype=torch.float32) / quarter
        self.register_buffer("inverse_frequency", 1.0 / ROTARY_BASE**exponent, persistent=False)
        self.sharding.mark(self)

    def merger_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters between tower and language model."""
        return [*self.merger.parameters(), *self.decoder.final_layernorm.parameters()]

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        self.decoder.set_input_tensor(input_tensor)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return self.sharding.sharded_state_dict(super().sharded_state_dict(prefix, sharded_offsets, metadata))

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """Every image of a micro-batch on every rank, however the work is shared out."""
        return self.sharding.encode(self, pixel_values, image_grid_thw, unit=self.unit)

    def nothing(self) -> torch.Tensor:
        """Zero, through every parameter of the tower."""
        weight = self.patch_embed.weight
        return self.sharding.blank(self, weight.shape[1], unit=self.unit, like=weight).sum() * 0.0

    def encode(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """The images given, on this rank's part of the tower."""
        vision = self.vision
        layout = patch_layout(
            image_grid_thw,
            merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        device = pixel_values.device
        order = to_device(layout.window_order, device)
        patches = pixel_values.shape[0]

        def to_window_order(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(patches // self.unit, self.unit, -1)[order].reshape(patches, -1)

        hidden = to_window_order(self.patch_embed(pixel_values.to(self.patch_embed.weight.dtype)))
        angles = to_device(layout.positions, device)[..., None].float() * self.inverse_frequency  # [P, 2, head_dim / 4]
        angles = to_window_order(angles.flatten(1))
        windows = _packed_on(device, layout.window_bounds)
        output = self.decoder(
            hidden_states=hidden[:, None, :],
            attention_mask=None,
            rotary_pos_emb=torch.cat([angles, angles], dim=-1)[:, None, None, :],
            packed_seq_params=WindowedRow(**vars(windows), frames=_packed_on(device, layout.frame_bounds)),
        )
        merged = self.merger(output.reshape(patches // self.unit, -1))
        return merged[torch.argsort(order)]
