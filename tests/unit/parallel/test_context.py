"""The context split and the sharing of images."""

from __future__ import annotations

import pytest
import torch

from megatron_r1reward.parallel.context import assign_images, gathered_order, zigzag_positions


def test_every_token_is_on_one_rank_and_causal_work_is_equal() -> None:
    bounds = (0, 16, 24, 64)
    parts = [zigzag_positions(bounds, 4, rank) for rank in range(4)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(64))
    within = torch.cat([torch.arange(16), torch.arange(8), torch.arange(40)])  # keys a token attends to, less one
    assert len({int(within[part].sum()) for part in parts}) == 1
    order = gathered_order(bounds, 4)
    assert torch.equal(torch.cat(parts)[order], torch.arange(64))


def test_lengths_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="30 tokens does not divide into 2 x 2 chunks"):
        zigzag_positions((0, 30), 2, 0)


def test_images_are_balanced_and_complete() -> None:
    patches = [400, 100, 100, 100, 100, 16]
    owned = assign_images(patches, 2)
    assert sorted(image for images in owned for image in images) == list(range(6))
    loads = [sum(patches[i] for i in images) for images in owned]
    assert max(loads) - min(loads) <= 16
    assert assign_images([5], 3) == [[0], [], []]
