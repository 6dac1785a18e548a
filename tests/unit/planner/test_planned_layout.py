"""Legality is that of the trainer: the same sizes reach the same checks."""

from __future__ import annotations

import pytest

from megatron_r1reward.config.schema import ParallelSection
from megatron_r1reward.model_folder.shape import read_shape
from megatron_r1reward.planner.catalog import bundled_config
from megatron_r1reward.planner.planned_layout import Layout, check, trainer_layout


def test_a_tensor_parallel_size_that_does_not_divide_names_the_nearest():
    shape = read_shape(bundled_config("Qwen2.5-VL-7B-Instruct"))
    problem = check(shape, ParallelSection(tensor_model_parallel_size=8), 8)
    assert problem is not None
    assert "28" in problem
    assert "tensor_model_parallel_size 4" in problem


def test_ranks_that_hold_no_whole_replica():
    shape = read_shape(bundled_config("Qwen2.5-VL-7B-Instruct"))
    problem = check(shape, ParallelSection(tensor_model_parallel_size=4), 6)
    assert problem is not None
    assert "6 ranks" in problem


def test_uneven_stages_follow_the_trainers_split():
    shape = read_shape(bundled_config("Qwen2.5-VL-7B-Instruct"))
    section = ParallelSection(pipeline_model_parallel_size=4, vision_placement="own_stage")
    layout = trainer_layout(shape, section, 8)
    assert layout.dp == 2
    assert layout.layers_of(0, 28) == []
    assert [len(layout.layers_of(stage, 28)) for stage in range(4)] == [0, 9, 9, 10]


@pytest.mark.parametrize(
    ("model", "keys", "world", "words"),
    [
        ("Qwen3-VL-30B-A3B-Instruct", {"expert_model_parallel_size": 8}, 16, None),
        ("Qwen3-VL-30B-A3B-Instruct", {"expert_model_parallel_size": 6}, 12, "nearest legal size is 4"),
        ("Qwen3-VL-30B-A3B-Instruct", {"expert_model_parallel_size": 8}, 12, "nearest legal size is 4"),
        ("Qwen3-VL-30B-A3B-Instruct", {"tensor_model_parallel_size": 2}, 8, "sequence_parallel"),
        ("Qwen3-VL-8B-Instruct", {"expert_model_parallel_size": 2}, 8, "no experts"),
    ],
)
def test_expert_parallel_sizes(model: str, keys: dict[str, int], world: int, words: str | None):
    problem = check(read_shape(bundled_config(model)), ParallelSection(**keys), world)
    assert (problem is None) == (words is None)
    assert words is None or words in str(problem)


def test_layers_of_an_equal_split():
    assert [Layout(pp=2).layers_of(stage, 4) for stage in range(2)] == [[0, 1], [2, 3]]
