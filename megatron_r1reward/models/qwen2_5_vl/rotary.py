"""M-RoPE: positions computed per sequence before packing, and a rotary embedding that respects packing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding


class PackedMultimodalRotary(MultimodalRotaryEmbedding):
    """megatron-core 0.16.1 slices the frequencies for context parallelism as one row even when sequences are packed,
    and slices them again per sequence in attention: silently wrong. Packed rows get the unsliced frequencies."""

    def forward(
        self, position_ids: torch.Tensor, mrope_section: list[int], cp_group: object | None = None
    ) -> torch.Tensor:
        context_group, self.cp_group = self.cp_group, None  # type: ignore[has-type]
        try:
            return super().forward(position_ids, mrope_section, cp_group=None)
        finally:
            self.cp_group = context_group


def mrope_positions(
    token_ids: Sequence[int], image_grids: Sequence[tuple[int, int, int]], *, image_token_id: int, merge_size: int
) -> torch.Tensor:
    """Temporal, height and width positions of one sequence of text and still images: int64 [3, T].

    Text advances all three together. An image's tokens share the temporal index of its start and carry their row and
    column; the text after it continues one past the largest position used. `token_ids` holds one `image_token_id` per
    merged patch, and `image_grids` (frames, rows, columns of patches) come in the order of the images.

    Raises:
        ValueError: the number of image tokens does not match the grids.
    """
    tokens = torch.tensor(token_ids)
    positions = torch.empty(3, len(tokens), dtype=torch.int64)
    is_image = tokens == image_token_id
    cursor, next_position = 0, 0
    for frames, rows, columns in image_grids:
        unit_rows, unit_columns = rows // merge_size, columns // merge_size
        length = frames * unit_rows * unit_columns
        remaining = is_image[cursor:].nonzero()
        if len(remaining) < length:
            raise ValueError(f"an image of {length} tokens, but only {len(remaining)} image tokens are left")
        start = cursor + int(remaining[0])
        text = torch.arange(start - cursor) + next_position
        positions[:, cursor:start] = text
        first = next_position + start - cursor
        grid = torch.meshgrid(torch.arange(frames), torch.arange(unit_rows), torch.arange(unit_columns), indexing="ij")
        positions[:, start : start + length] = torch.stack([axis.flatten() for axis in grid]) + first
        cursor = start + length
        next_position = int(positions[:, start:cursor].max()) + 1
    if bool(is_image[cursor:].any()):
        raise ValueError(f"{int(is_image.sum())} image tokens are more than the {len(image_grids)} images hold")
    positions[:, cursor:] = torch.arange(len(tokens) - cursor) + next_position
    return positions
