"""Videos of Qwen2.5-VL against transformers: one grid of several frames, whose distance in time is in the positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpus import CORPUS
from family import MEMBERS, Member, reference_model, response_log_probs

from megatron_r1reward.config.schema import ParallelSection
from megatron_r1reward.demo.tiny_models import write_tiny_checkpoint
from megatron_r1reward.models.qwen2_5_vl.rotary import mrope_positions
from megatron_r1reward.parallel import setup
from megatron_r1reward.types import PackedBatch

# Frames, rows and columns of patches: ragged windows, an odd number of merged columns; then an image.
VIDEO, IMAGE = (3, 8, 6), (1, 4, 4)
TOKENS = [frames * rows * columns // 4 for frames, rows, columns in (VIDEO, IMAGE)]


@pytest.fixture(scope="module")
def topology():
    yield setup.initialize(ParallelSection(), seed=0)
    setup.shutdown()


@pytest.fixture(scope="module")
def member(tmp_path_factory: pytest.TempPathFactory) -> Member:
    folder: Path = tmp_path_factory.mktemp("video") / "checkpoint"
    write_tiny_checkpoint(folder, corpus=CORPUS, spec=MEMBERS["qwen2_5_vl"], init_std=0.15)
    return Member(folder)


@pytest.fixture(scope="module")
def tokens(member: Member) -> tuple[list[int], int]:
    """Token ids of a prompt with a video and an image and of its response; the length of the prompt."""
    video, image = ("<|vision_start|>" + f"<|{kind}_pad|>" * n + "<|vision_end|>" for kind, n in zip(
        ("video", "image"), TOKENS, strict=True))  # fmt: skip
    prompt = member.tokenizer.encode(f"<|im_start|>user\nWatch this. {video} And see {image} Which digit?")
    return [*prompt, *member.tokenizer.encode("The image shows 7.")], len(prompt)


def positions(member: Member, ids: list[int], seconds: float) -> torch.Tensor:
    """`seconds` between two frames of the video."""
    interval = member.config.vision_config.tokens_per_second * seconds
    return mrope_positions(
        ids, [VIDEO, IMAGE], image_token_id=member.config.image_token_id, merge_size=2,
        video_token_id=member.config.video_token_id, frame_intervals=[interval, 1.0],
    )  # fmt: skip


def pixels(grid: tuple[int, int, int], seed: int) -> torch.Tensor:
    frames, rows, columns = grid
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames * rows * columns, 3 * 2 * 14 * 14, generator=generator)


def expected(member: Member, ids: list[int], prompt_length: int, **more: torch.Tensor) -> torch.Tensor:
    """transformers' log-probs of the response."""
    ids_1T = torch.tensor([ids])
    inputs = {
        "pixel_values_videos": pixels(VIDEO, 0),
        "video_grid_thw": torch.tensor([VIDEO]),
        "pixel_values": pixels(IMAGE, 1),
        "image_grid_thw": torch.tensor([IMAGE]),
        "mm_token_type_ids": (
            2 * (ids_1T == member.config.video_token_id) + (ids_1T == member.config.image_token_id)
        ).int(),
    }
    with torch.no_grad():
        return response_log_probs(reference_model(member), ids_1T, prompt_length, inputs | more)


def packed_twice(ids: list[int], prompt_length: int, positions_3T: torch.Tensor) -> PackedBatch:
    """A text-only copy of the prompt's end, then the sequence with the video: packing must not move its positions."""
    text = ids[prompt_length - 4 :]
    length = len(text) + len(ids)
    response = torch.arange(prompt_length, len(ids)) + len(text)
    return PackedBatch(
        input_ids=torch.tensor([[*text, *ids]]),
        position_ids=torch.cat([torch.arange(len(text)).expand(3, -1), positions_3T], dim=1)[:, None],
        cu_seqlens=torch.tensor([0, len(text), length], dtype=torch.int32),
        bounds=(0, len(text), length),
        response_positions=response - 1,
        targets=torch.tensor(ids[prompt_length:]),
        response_sequence=torch.ones(len(response), dtype=torch.int64),
        sequence_indices=(0, 1),
        pixel_values=torch.cat([pixels(VIDEO, 0), pixels(IMAGE, 1)]),
        image_grid_thw=torch.tensor([VIDEO, IMAGE]),
    )


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.1, 0.25, 0.4])
def test_video_log_probs_are_those_of_transformers(seconds, member, tokens, topology) -> None:
    """The video is shorter than its grid is high: transformers computes the positions itself."""
    ids, prompt_length = tokens
    interval = member.config.vision_config.tokens_per_second * seconds
    assert int((VIDEO[0] - 1) * interval) < VIDEO[1] // 2
    reference = expected(member, ids, prompt_length, second_per_grid_ts=torch.tensor([seconds]))
    model = member.build(topology)
    got = model(packed_twice(ids, prompt_length, positions(member, ids, seconds)))[0]
    torch.testing.assert_close(got, reference, atol=1e-4, rtol=0)


def test_a_long_video_is_followed_by_text_that_comes_after_it(member, tokens, topology) -> None:
    """Two seconds per frame at 4 positions per second: frames at 0, 8 and 16, text from 17 on (vLLM's rule; the one of
    transformers 5 would go on at 4, between the frames). transformers is given these positions."""
    member.config.vision_config.tokens_per_second = 4
    ids, prompt_length = tokens
    positions_3T = positions(member, ids, 2.0)
    start = ids.index(member.config.video_token_id)
    video = slice(start, start + TOKENS[0])
    assert (positions_3T[0, video].unique() - start).tolist() == [0, 8, 16]
    assert (positions_3T[:, video.stop] - start).tolist() == [17, 17, 17]
    reference = expected(member, ids, prompt_length, position_ids=positions_3T[:, None])
    got = member.build(topology)(packed_twice(ids, prompt_length, positions_3T))[0]
    torch.testing.assert_close(got, reference, atol=1e-4, rtol=0)


def test_intervals_that_do_not_fit_the_grids_are_refused(member, tokens) -> None:
    with pytest.raises(ValueError, match="1 frame intervals for 2 grids"):
        mrope_positions(tokens[0], [VIDEO, IMAGE], image_token_id=0, merge_size=2, frame_intervals=[2.0])
