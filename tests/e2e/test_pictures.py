"""Trainer and server see the same picture, whatever file it comes in: bit by bit, and in the log-probabilities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import write_deep_pictures, write_pictures
from reference import Reference

from megatron_r1reward.config.schema import SamplingSection
from megatron_r1reward.data.image_files import FORMATS, decode, examine_images
from megatron_r1reward.data.prompt import PromptBuilder
from megatron_r1reward.rollout.pool import RolloutPool
from megatron_r1reward.types import Preference

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind that the trainer decodes; the deep ones as the reader writes them out."""
    folder = tmp_path_factory.mktemp("pictures")
    deep = {name: str(path) for name, path in write_deep_pictures(folder).items()}
    examined = examine_images(deep.values(), folder / "media")
    return {**write_pictures(folder), **{name: Path(examined[path].path) for name, path in deep.items()}}


def test_decoded_as_by_the_servers_loader_bit_by_bit(pictures: dict[str, Path]) -> None:
    from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
    from vllm.multimodal.media.image import ImageMediaIO

    assert set(FORMATS) <= set(ALLOWED_IMAGE_FORMATS)
    for name, path in pictures.items():
        ours, theirs = decode(path), ImageMediaIO().load_file(path).media
        assert (ours.mode, ours.size) == (theirs.mode, theirs.size) == ("RGB", ours.size), name
        assert np.array_equal(np.asarray(ours), np.asarray(theirs)), name


def test_the_servers_log_probs_are_those_of_the_trainers_pixels(
    shared_pool: RolloutPool, reference: Reference, pictures: dict[str, Path]
) -> None:
    prompts = [reference.prompt(name, "Which response is better?", str(path)) for name, path in pictures.items()]
    inside = Preference(
        id="inside", question="Which?", responses=("this <image> or <image>?", "that <image>"), label=1,
        image_paths=tuple(map(str, list(pictures.values())[:4])), response_images=(2, 1),
    )  # fmt: skip
    builder = PromptBuilder(reference.tokenizer, 1000, template="{question} 1. {answer1} 2. {answer2}")
    among_texts = [builder.build(inside, swapped=swapped) for swapped in (False, True)]
    result = shared_pool.generate([*prompts, *among_texts], SamplingSection(max_tokens=12), n=1, seed=0)
    assert not result.failed
    gaps = {rollout.prompt.id: reference.error(rollout) for rollout in result.rollouts}
    assert set(gaps) == {*pictures, *(prompt.id for prompt in among_texts)}
    assert {name: gap for name, gap in gaps.items() if gap >= 1e-4} == {}
    (one,) = shared_pool.generate(prompts[:1], SamplingSection(max_tokens=12), n=1, seed=0).rollouts
    other = reference.prompt("1", "Which response is better?", str(pictures["jpeg orientation 6"]))
    with torch.no_grad():  # the bound tells pictures apart
        assert reference.error(type(one)(**{**vars(one), "prompt": other})) > 1e-2
