"""Image embeddings into token embeddings."""

from __future__ import annotations

import torch

from megatron_r1reward.parallel.context import ContextSplit
from megatron_r1reward.types import PackedBatch


def place_images(
    embedding_T1H: torch.Tensor,
    images_MH: torch.Tensor,
    batch: PackedBatch,
    split: ContextSplit | None,
    *,
    placeholders: tuple[int, ...],
) -> torch.Tensor:
    """Replace the embeddings of image (and video) placeholders by the images' embeddings.

    Args:
        embedding_T1H: embeddings of this context-parallel rank's tokens.
        images_MH: embeddings of the batch's distinct images, in order.
        split: this rank's share of the row; None: all of it.
        placeholders: token ids that stand for images and video frames.

    Raises:
        ValueError: the placeholders are not as many as the images' tokens.
    """
    ids_T, rows_K = batch.input_ids[0], batch.image_rows
    is_image_T = torch.zeros_like(ids_T, dtype=torch.bool)
    for token_id in placeholders:
        is_image_T |= ids_T == token_id
    needed, available = int(is_image_T.sum()), images_MH.shape[0] if rows_K is None else len(rows_K)
    if needed != available:
        raise ValueError(f"{needed} image tokens in the batch, but its images have {available}")
    if split is not None:
        slot_T = is_image_T.cumsum(0) - 1  # which placeholder a position is
        is_image_T = is_image_T[split.positions]
        slot_K = slot_T[split.positions][is_image_T]
        rows_K = slot_K if rows_K is None else rows_K[slot_K]
    values_KH = images_MH if rows_K is None else images_MH.index_select(0, rows_K)
    return embedding_T1H.masked_scatter(is_image_T[:, None, None], values_KH.to(embedding_T1H.dtype))
