"""Layouts: what is refused, why, and what is proposed instead; the split of layers over chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_r1reward.cluster.legality import (
    check_layout,
    layout_problem,
    nearest_layout,
    pipeline_layout,
    split_layers,
)
from megatron_r1reward.config.schema import ParallelSection
from megatron_r1reward.model_folder.shape import ModelShape, read_shape
from megatron_r1reward.planner.catalog import bundled_config

SEVEN_B = read_shape(bundled_config("Qwen2.5-VL-7B-Instruct"))


def sized(**text: int) -> ModelShape:
    return replace(SEVEN_B, text=replace(SEVEN_B.text, **text))


def parallel(**values: object) -> ParallelSection:
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
    names |= {"vpp": "virtual_pipeline_model_parallel_size", "cp": "context_parallel_size"}
    return ParallelSection(**{names.get(key, key): value for key, value in values.items()})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": 3}, "does not divide num_attention_heads 28.*nearest legal layout: tensor_model_parallel_size [24]"),
        ({"tp": 8}, "does not divide num_attention_heads 28.*tensor_model_parallel_size 4"),
        ({"pp": 29}, "29 pipeline chunks are more than the 28 layers.*pipeline_model_parallel_size 28"),
        ({"pp": 8, "vpp": 4}, "32 pipeline chunks.*nearest legal layout: pipeline_model_parallel_size"),
        ({"tp": 4, "cp": 2, "context_parallel_comm": "a2a"}, "cuts 7 attention heads per rank into 2"),
        ({"cp": 7, "context_parallel_comm": "a2a"}, "cuts 4 key and value heads per rank into 7"),
    ],
)
def test_refusals_give_the_reason_and_the_nearest_legal_layout(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_layout(SEVEN_B, parallel(**values))


def test_vision_sizes_matter_only_where_the_tower_is_cut() -> None:
    shape = sized(heads=32, groups=8)
    assert "vision intermediate_size 3420; parallel.vision = 'image_sharded'" in str(
        layout_problem(shape, parallel(tp=8))
    )
    assert layout_problem(shape, parallel(tp=8, vision="image_sharded")) is None


def test_the_nearest_layout_fits_the_world() -> None:
    asked = parallel(tp=4, pp=2, cp=2)
    assert "start a multiple of 16 ranks" in str(layout_problem(SEVEN_B, asked, world_size=12))
    found = nearest_layout(SEVEN_B, asked, world_size=12)
    size = found.tensor_model_parallel_size * found.pipeline_model_parallel_size * found.context_parallel_size
    assert 12 % size == 0
    assert size >= 4
    assert layout_problem(SEVEN_B, found, world_size=12) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vpp": 2}, "pipeline_model_parallel_size is 1"),
        ({"vision_placement": "own_stage"}, "pipeline_model_parallel_size is 1"),
        ({"overlap_param_gather": True}, "needs overlap_grad_reduce and use_distributed_optimizer"),
    ],
)
def test_the_run_file_refuses_what_no_model_can_do(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        parallel(**values)


def test_equal_stages_by_default_and_uneven_ones_where_they_do_not_divide() -> None:
    assert split_layers(SEVEN_B, parallel(pp=4)) == [7, 7, 7, 7]
    assert pipeline_layout(SEVEN_B, parallel(pp=4)) is None
    assert split_layers(SEVEN_B, parallel(pp=8)) == [3, 3, 3, 3, 4, 4, 4, 4]
    rows = pipeline_layout(SEVEN_B, parallel(pp=8))
    assert rows is not None
    assert rows[0] == ["embedding", "decoder", "decoder", "decoder"]
    assert rows[-1][-1] == "loss"


def test_vision_placements() -> None:
    assert split_layers(SEVEN_B, parallel(pp=4, vision_placement="own_stage")) == [0, 9, 9, 10]
    balanced = split_layers(SEVEN_B, parallel(pp=4, vision_placement="balanced"))
    assert sum(balanced) == 28
    tower = SEVEN_B.vision_layers_per_token * 0.5
    loads = [balanced[0] + tower, *balanced[1:]]
    assert max(loads) - min(loads) <= 1.5
    assert split_layers(SEVEN_B, parallel(pp=2, vpp=2, vision_placement="own_stage"))[0] == 0
    interleaved = split_layers(SEVEN_B, parallel(pp=2, vpp=2, vision_placement="balanced"))
    assert interleaved[0] + interleaved[2] < interleaved[1] + interleaved[3]
    assert sum(interleaved) == 28
