"""Parameter counts against transformers' own models, and what a rank of a layout holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from megatron_r1reward.model_folder.shape import read_shape
from megatron_r1reward.planner.catalog import bundled_config, bundled_names, find_model
from megatron_r1reward.planner.parameters import active_per_token, all_tensors, by_component, stage_tensors
from megatron_r1reward.planner.planned_layout import Layout

# Totals in the safetensors metadata of the published checkpoints.
PUBLISHED = {
    "Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen2.5-VL-32B-Instruct": 33_452_718_336,
    "Qwen2.5-VL-72B-Instruct": 73_410_777_344,
    "Qwen3-VL-8B-Instruct": 8_767_123_696,
    "Qwen3-VL-30B-A3B-Instruct": 31_070_754_032,
}


def shape_of(name: str):
    return read_shape(bundled_config(name), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled_names())
def test_every_shipped_configuration_counts_as_transformers_does(name: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(bundled_config(name)))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    vision = sum(p.numel() for n, p in model.named_parameters() if ".visual." in n)
    counts = by_component(all_tensors(shape_of(name)))
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["vision tower"] + counts["vision merger"] == vision
    assert counts["embedding"] == model.get_input_embeddings().weight.numel()


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_published_totals(name: str, total: int):
    assert sum(by_component(all_tensors(shape_of(name))).values()) == total


def test_a_saved_folder_in_the_nested_layout_reads_the_same(tiny_folder: Path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    found = find_model(tiny_folder)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_folder)
    assert found.weights
    assert sum(by_component(all_tensors(found.shape)).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["Qwen2.5-VL-72B-Instruct", "Qwen3-VL-30B-A3B-Instruct"])
def test_ranks_of_a_layout_hold_every_cut_tensor_once(name: str):
    shape = shape_of(name)
    layout = Layout(tp=4, pp=2, etp=4)
    whole = by_component(all_tensors(shape))
    ranks = [by_component(stage_tensors(shape, layout, stage), layout) for stage in range(2)]
    for component in {"attention", "mlp", "experts", "embedding", "head"} & set(whole):
        assert 4 * sum(rank.get(component, 0) for rank in ranks) == whole[component]
    # norms and the router are held whole by every tensor-parallel rank
    for component in {"norms", "router"} & set(whole):
        assert sum(rank[component] for rank in ranks) == whole[component]


def test_experts_are_cut_over_expert_and_expert_tensor_ranks():
    shape = shape_of("Qwen3-VL-30B-A3B-Instruct")
    layout = Layout(tp=2, ep=8, etp=1, dp=4)
    held = by_component(stage_tensors(shape, layout, 0), layout)
    assert held["experts"] == by_component(all_tensors(shape))["experts"] // 8


def test_a_tied_model_in_a_pipeline_keeps_a_second_embedding():
    shape = shape_of("Qwen2.5-VL-3B-Instruct")
    assert "head" not in by_component(stage_tensors(shape, Layout(), 0))
    layout = Layout(pp=2)
    last = by_component(stage_tensors(shape, layout, 1), layout)
    assert last["head"] == 151_936 * 2048


def test_an_image_sharded_tower_is_whole_on_every_rank():
    shape = shape_of("Qwen2.5-VL-7B-Instruct")
    layout = Layout(tp=4, vision_replicated=True)
    held = by_component(stage_tensors(shape, layout, 0), layout)
    assert held["vision tower"] == by_component(all_tensors(shape))["vision tower"]


def test_active_parameters_of_a_mixture_of_experts():
    text = shape_of("Qwen3-VL-30B-A3B-Instruct").text
    per_layer = 2048 * (32 * 128 + 2 * 4 * 128) + 32 * 128 * 2048 + 128 * 2048 + 8 * 3 * 768 * 2048
    assert active_per_token(text, tuple(range(48))) == 48 * per_layer


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"hidden_size": None}])
def test_unknown_or_incomplete_configurations_are_refused(change: dict[str, object]):
    config = {k: v for k, v in {**bundled_config("Qwen2.5-VL-7B-Instruct"), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=r"llama|hidden_size"):
        read_shape(config, "somewhere/config.json")


def test_an_unknown_folder_names_the_shipped_configurations(tmp_path: Path):
    with pytest.raises(ValueError, match=r"Qwen2.5-VL-72B-Instruct.*Qwen3-VL-8B-Instruct"):
        find_model(tmp_path / "nothing")
