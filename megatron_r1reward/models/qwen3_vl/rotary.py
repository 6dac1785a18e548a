"""Interleaved M-RoPE, and the positions of images and video frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding

from megatron_r1reward.models.qwen2_5_vl.rotary import mrope_positions


class InterleavedMultimodalRotary(MultimodalRotaryEmbedding):
    """Frequency i turns with the temporal, height or width position as i % 3 is 0, 1 or 2, while the axis has
    frequencies left (`mrope_section`); what is left over is temporal. Nothing is sliced for context parallelism, as in
    the first family: a rank gives the positions of its own tokens."""

    def forward(
        self, position_ids: torch.Tensor, mrope_section: list[int], cp_group: object | None = None
    ) -> torch.Tensor:
        """position_ids int64 [3, 1, T] -> float32 [T, 1, 1, head_dim]."""
        assert self.seq_len_interpolation_factor is None and not self.rotary_interleaved
        angles_3BTF = position_ids[..., None].float() * self.inv_freq
        chosen_BTF = angles_3BTF[0].clone()
        for axis in (1, 2):
            frequencies = slice(axis, 3 * mrope_section[axis], 3)
            chosen_BTF[..., frequencies] = angles_3BTF[axis, ..., frequencies]
        return torch.cat([chosen_BTF, chosen_BTF], dim=-1).transpose(0, 1)[:, :, None]


def positions(
    token_ids: Sequence[int],
    image_grids: Sequence[tuple[int, int, int]],
    *,
    image_token_id: int,
    merge_size: int,
    video_token_id: int | None = None,
) -> torch.Tensor:
    """Temporal, height and width positions of one sequence: int64 [3, T].

    `image_grids` are those of images and video frames in the order of their tokens. A video is given frame by frame
    (frames, rows, columns with one frame): time is in the text between the frames, not in the positions.

    Raises:
        ValueError: the number of image and video tokens does not match the grids.
    """
    return mrope_positions(
        token_ids, image_grids, image_token_id=image_token_id, merge_size=merge_size, video_token_id=video_token_id
    )
