"""Sequences to micro-batches: placeholders, budgets, positions, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from megatron_r1reward.data.packing import Packer, expand_images
from megatron_r1reward.data.pixels import ImageProcessor
from megatron_r1reward.models.qwen2_5_vl.rotary import mrope_positions
from megatron_r1reward.types import Prompt, Sequence

IMAGE = 900


@pytest.fixture(scope="module")
def packer(tiny_folder):
    return Packer(
        image_processor=ImageProcessor(tiny_folder, min_pixels=3136, max_pixels=28 * 28 * 64),
        image_token_id=IMAGE,
        positions=mrope_positions,
        pad_token_id=0,
        token_budget=20,
        device=torch.device("cpu"),
        pad_multiple=4,
    )


def prompt(ids, images=()):
    return Prompt(id="p", preference_id="p", token_ids=tuple(ids), image_paths=tuple(images), label=1, swapped=False)


def test_expand_images():
    assert expand_images([1, IMAGE, 2, IMAGE], [2, 3], IMAGE) == (1, IMAGE, IMAGE, 2, IMAGE, IMAGE, IMAGE)
    with pytest.raises(ValueError, match="1 image placeholders for 2 images"):
        expand_images([IMAGE], [1, 1], IMAGE)


def test_a_response_with_an_image_placeholder_or_without_tokens_is_refused(packer):
    with pytest.raises(ValueError, match="image placeholder"):
        packer.sequence(prompt([1, 2]), [3, IMAGE])
    with pytest.raises(ValueError, match="empty"):
        packer.sequence(prompt([1, 2]), [])


def test_plan_keeps_the_budget_and_every_sequence(packer):
    lengths = [3, 19, 7, 7, 7, 25, 1, 12]
    sequences = [Sequence(token_ids=tuple(range(n)), prompt_length=0, image_paths=()) for n in lengths]
    plan = packer.plan(sequences, range(len(lengths)))
    assert sorted(i for members in plan for i in members) == list(range(len(lengths)))
    for members in plan:
        assert len(members) == 1 or sum(lengths[i] for i in members) <= 20
    assert len(plan) <= 6
    assert plan == packer.plan(sequences, range(len(lengths)))


def test_pack_predicts_each_response_token_from_the_position_before(packer):
    first = packer.sequence(prompt([10, 11, 12]), [20, 21])
    second = packer.sequence(prompt([13]), [22, 23, 24])
    batch = packer.pack([first, second], [0, 1])
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 13, 22, 23, 24, 0, 0, 0]], "padded to a multiple of 4"
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert batch.targets.tolist() == [20, 21, 22, 23, 24]
    assert batch.response_positions.tolist() == [2, 3, 5, 6, 7]
    assert batch.response_sequence.tolist() == [0, 0, 1, 1, 1]
    assert batch.position_ids[0, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2], "positions restart per sequence"
    assert batch.pixel_values is None


def test_text_only_rows_share_a_pack_with_images(packer, image_paths):
    """Each sequence has the ids and positions that it has alone; the pixels are those of the rows with images."""
    rows = [
        packer.sequence(prompt([1, IMAGE, 2], image_paths[:1]), [5]),
        packer.sequence(prompt([1, 3, 4, 2]), [6, 7]),
        packer.sequence(prompt([1, IMAGE, 2], image_paths[1:2]), [8]),
    ]
    whole, alone = packer.pack(rows, [0, 1, 2]), [packer.pack(rows, [index]) for index in range(3)]
    start = 0
    for row, single in zip(rows, alone, strict=True):
        end = start + len(row.token_ids)
        assert whole.input_ids[0, start:end].tolist() == list(row.token_ids)
        assert torch.equal(whole.position_ids[..., start:end], single.position_ids[..., : len(row.token_ids)])
        start = end
    assert alone[1].pixel_values is None
    assert torch.equal(whole.pixel_values, torch.cat([alone[0].pixel_values, alone[2].pixel_values]))
    assert whole.targets.tolist() == [5, 6, 7, 8]


def test_positions_are_those_of_transformers(tiny_folder):
    config = Qwen2_5_VLConfig.from_pretrained(tiny_folder)
    reference = Qwen2_5_VLModel(config)
    image = config.image_token_id
    grids = [(1, 4, 6), (1, 14, 10)]
    ids = [5, 6, *[image] * 6, 7, 8, 9, *[image] * 35, 10, 11]
    tokens = torch.tensor([ids])
    expected, _ = reference.get_rope_index(
        tokens, (tokens == image).int(), image_grid_thw=torch.tensor(grids), attention_mask=torch.ones_like(tokens)
    )
    got = mrope_positions(ids, grids, image_token_id=image, merge_size=2)
    assert torch.equal(got, expected[:, 0])


@pytest.mark.parametrize("ids", [[IMAGE] * 5, [IMAGE] * 7])
def test_image_tokens_that_do_not_fit_the_grid_are_refused(ids):
    with pytest.raises(ValueError, match="image"):
        mrope_positions(ids, [(1, 4, 6)], image_token_id=IMAGE, merge_size=2)


def test_context_parallelism_pads_every_sequence_at_its_end(packer):
    padded = Packer(**{**packer.__dict__, "sequence_multiple": 4, "pad_multiple": 8})
    sequences = [padded.sequence(prompt([1, 2, 3]), [4, 5]), padded.sequence(prompt([6]), [7, 8, 9])]
    batch = padded.pack(sequences, [0, 1])
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 8, 9, 0, 0, 0, 0]]
    assert batch.response_positions.tolist() == [2, 3, 8, 9, 10]
    assert batch.targets.tolist() == [4, 5, 7, 8, 9]


def test_a_micro_batch_without_sequences_is_padding(packer):
    batch = packer.pack([], [])
    assert (batch.num_tokens, batch.targets.numel(), batch.pixel_values) == (4, 0, None)


def test_samples_that_share_an_image_share_a_micro_batch(packer, image_paths):
    together = Packer(**{**packer.__dict__, "token_budget": 30, "share_images": True})
    images = {1: image_paths[:1], 4: image_paths[:1]}
    sequences = [
        Sequence(token_ids=(1,) * length, prompt_length=1, image_paths=images.get(number, ()))
        for number, length in enumerate([14, 15, 13, 12, 5])
    ]
    assert [1, 4] in [[i for i in part if i in images] for part in together.plan(sequences, range(5))]
