"""M-RoPE: positions computed per sequence before packing, and a rotary embedding that respects packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class PackedMultimodalRotary(MultimodalRotaryEmbedding):
    """megatron-core 0.16.1 slices the frequencies for context parallelism as one row even when sequences are packed:
    silently wrong. Here a rank gives the positions of its own tokens and gets their frequencies."""

    def forward(
        self, position_ids: torch.Tensor, mrope_section: list[int], cp_group: object | None = None
    ) -> torch.Tensor:
        context_group, self.cp_group = self.cp_group, None  # type: ignore[has-type]
        try:
            return super().forward(position_ids, mrope_section, cp_group=None)
        finally:
            self.cp_group = context_group


def rotary_frequencies(text_config: Any, unscaled_F: torch.Tensor) -> torch.Tensor:
    """Inverse frequencies float32 [head_dim / 2] as transformers computes them for the configuration's RoPE type; the
    factor on sines and cosines that belongs to a scaling is `parallel.transformer.scale_rotations`."""
    kind = text_config.rope_parameters["rope_type"]
    if kind == "default":
        return unscaled_F
    scaled_F, _ = ROPE_INIT_FUNCTIONS[kind](text_config, unscaled_F.device)
    assert scaled_F.shape == unscaled_F.shape
    return scaled_F


def mrope_positions(
    token_ids: Sequence[int],
    image_grids: Sequence[tuple[int, int, int]],
    *,
    image_token_id: int,
    merge_size: int,
    video_token_id: int | None = None,
    frame_intervals: Sequence[float] = (),
) -> torch.Tensor:
    """Temporal, height and width positions of one sequence of text, images and videos: int64 [3, T].

    Text advances all three together. An image's tokens share the temporal index of its start and carry their row and
    column; the frames of a video lie `frame_intervals` positions apart, rounded down. The text after either continues
    one past the largest position used, as the model was trained and as vLLM has it. transformers 5 continues past the
    larger side of the grid instead, which differs after videos that last longer than they are wide.

    Args:
        token_ids: one `image_token_id` (or `video_token_id`) per merged patch.
        image_grids: frames, rows, columns of patches of images and videos in the order of their tokens.
        frame_intervals: for every grid (1.0 for an image), or empty: 1.0 for all. A video's is the
            configuration's `tokens_per_second` times the seconds between its frames (`second_per_grid_ts`).

    Raises:
        ValueError: the number of image and video tokens, or of intervals, does not match the grids.
    """
    if frame_intervals and len(frame_intervals) != len(image_grids):
        raise ValueError(f"{len(frame_intervals)} frame intervals for {len(image_grids)} grids: give one for each")
    if video_token_id is not None:
        token_ids = [image_token_id if token == video_token_id else token for token in token_ids]
    tokens = torch.tensor(token_ids)
    positions = torch.empty(3, len(tokens), dtype=torch.int64)
    is_image = tokens == image_token_id
    cursor, next_position = 0, 0
    intervals = frame_intervals or [1.0] * len(image_grids)
    for (frames, rows, columns), interval in zip(image_grids, intervals, strict=True):
        unit_rows, unit_columns = rows // merge_size, columns // merge_size
        length = frames * unit_rows * unit_columns
        remaining = is_image[cursor:].nonzero()
        if len(remaining) < length:
            raise ValueError(f"an image of {length} tokens, but only {len(remaining)} image tokens are left")
        start = cursor + int(remaining[0])
        text = torch.arange(start - cursor) + next_position
        positions[:, cursor:start] = text
        first = next_position + start - cursor
        times = (torch.arange(frames) * interval).long()
        grid = torch.meshgrid(times, torch.arange(unit_rows), torch.arange(unit_columns), indexing="ij")
        positions[:, start : start + length] = torch.stack([axis.flatten() for axis in grid]) + first
        cursor = start + length
        next_position = int(positions[:, start:cursor].max()) + 1
    if bool(is_image[cursor:].any()):
        raise ValueError(f"{int(is_image.sum())} image tokens are more than the {len(image_grids)} images hold")
    positions[:, cursor:] = torch.arange(len(tokens) - cursor) + next_position
    return positions
