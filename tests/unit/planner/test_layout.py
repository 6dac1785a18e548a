"""Legality is that of the trainer: the same sizes reach the same checks."""

from __future__ import annotations

import pytest
from transformers import Qwen2_5_VLConfig

from megatron_r1reward.config.schema import ModelSection, ParallelSection
from megatron_r1reward.models.qwen2_5_vl.config import model_shape
from megatron_r1reward.planner.catalog import bundled_config, bundled_names
from megatron_r1reward.planner.layout import Layout, check, parallel_shape, trainer_layout
from megatron_r1reward.planner.shapes import read_shape

MODEL = ModelSection(path="x")


@pytest.mark.parametrize("name", [n for n in bundled_names() if n.startswith("Qwen2.5")])
def test_the_trainer_checks_the_same_sizes(name: str):
    config = bundled_config(name)
    assert parallel_shape(read_shape(config)) == model_shape(Qwen2_5_VLConfig.from_dict(config))


def test_a_tensor_parallel_size_that_does_not_divide_names_the_nearest():
    shape = read_shape(bundled_config("Qwen2.5-VL-7B-Instruct"))
    problem = check(shape, ParallelSection(tensor_model_parallel_size=8), MODEL, 8)
    assert problem is not None
    assert "28" in problem
    assert "tensor_model_parallel_size 4" in problem


def test_ranks_that_hold_no_whole_replica():
    shape = read_shape(bundled_config("Qwen2.5-VL-7B-Instruct"))
    problem = check(shape, ParallelSection(tensor_model_parallel_size=4), MODEL, 6)
    assert problem is not None
    assert "6 ranks" in problem


def test_uneven_stages_follow_the_trainers_split():
    shape = read_shape(bundled_config("Qwen2.5-VL-7B-Instruct"))
    section = ParallelSection(pipeline_model_parallel_size=4, vision_placement="own_stage")
    layout = trainer_layout(shape, section, 8)
    assert layout.dp == 2
    assert layout.layers_of(0, 28) == []
    assert [len(layout.layers_of(stage, 28)) for stage in range(4)] == [0, 9, 9, 10]


def test_expert_sizes(monkeypatch: pytest.MonkeyPatch):
    moe = read_shape(bundled_config("Qwen3-VL-30B-A3B-Instruct"))
    dense = read_shape(bundled_config("Qwen3-VL-8B-Instruct"))
    module = "megatron_r1reward.planner.layout"

    def expert_size(size: int) -> None:
        monkeypatch.setattr(f"{module}.expert_size", lambda section: size)

    expert_size(8)
    assert check(moe, ParallelSection(), MODEL, 16) is None
    assert "dense" in check(dense, ParallelSection(), MODEL, 16) or "none" in check(dense, ParallelSection(), MODEL, 16)
    expert_size(6)
    assert "nearest legal size is 4" in check(moe, ParallelSection(), MODEL, 12)
    expert_size(8)
    assert "is 4" in check(moe, ParallelSection(), MODEL, 12)


def test_layers_of_an_equal_split():
    assert [Layout(pp=2).layers_of(stage, 4) for stage in range(2)] == [[0, 1], [2, 3]]
