"""The Transformer Engine path as far as a machine without it can follow: from run file and published configuration to
megatron-core's, and to the specs of every layer kind. `benchmarks/precision_training.py` runs what they build."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.extensions import transformer_engine as extensions
from megatron.core.transformer.enums import AttnMaskType
from packaging.version import Version
from transformers import AutoConfig

from megatron_r1reward.config.schema import MoeSection, ParallelSection, PrecisionSection
from megatron_r1reward.models.qwen3_vl.layers import DeepstackLayer, WeightedRouter, decoder_layer_spec
from megatron_r1reward.models.registry import family_of
from megatron_r1reward.parallel import precision
from megatron_r1reward.parallel.precision import Device
from megatron_r1reward.parallel.specs import final_norm, layer_spec
from megatron_r1reward.planner.catalog import bundled_config

H100 = Device(name="H100", capability=(9, 0), transformer_engine=(2, 20))


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "this_device", lambda: H100)
    monkeypatch.setattr("megatron.core.utils.get_te_version", lambda: Version("2.20"))  # asked with FP8 experts


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's wrappers can be named, not built, without Transformer Engine."""
    monkeypatch.setattr(extensions, "HAVE_TE", True)


def configs(name: str, values: dict[str, Any], **parallel: Any) -> Any:
    """megatron-core configurations of a published size."""
    tree = bundled_config(name)
    hf = AutoConfig.for_model(**tree)
    section = ParallelSection.model_validate(parallel)
    build = family_of(hf).build_configs
    return build(hf, section, torch.bfloat16, PrecisionSection(**values), MoeSection())


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("Qwen2.5-VL-7B-Instruct", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        ("Qwen2.5-VL-72B-Instruct", {"pipeline_model_parallel_size": 4}),
        ("Qwen3-VL-8B-Instruct", {"context_parallel_size": 2, "context_parallel_comm": "a2a"}),
        ("Qwen3-VL-30B-A3B-Instruct", {"expert_model_parallel_size": 8}),
    ],
)
def test_fp8_reaches_the_language_model_of_published_sizes_and_not_the_tower(name, parallel, recipe, h100) -> None:
    values = {"transformer_impl": "transformer_engine", "fp8": "hybrid", "fp8_recipe": recipe, "fp8_param_gather": True}
    built = configs(name, values, **parallel)
    language, vision = built.language, built.vision
    assert (language.fp8, language.fp8_recipe, language.fp8_param) == ("hybrid", Fp8Recipe(recipe), True)
    assert language.transformer_impl == "transformer_engine"
    assert vision.fp8 is None and not vision.fp8_param
    assert language.cp_comm_type == parallel.get("context_parallel_comm", "p2p")


def test_bf16_needs_no_recipe(h100) -> None:
    language = configs("Qwen2.5-VL-7B-Instruct", {"transformer_impl": "transformer_engine"}).language
    assert language.fp8 is None and language.bf16


def test_a_cut_that_leaves_no_fp8_shape_is_refused(h100) -> None:
    """A published size: 29568 / 4 is a multiple of 16 and not of 128."""
    values = {"transformer_impl": "transformer_engine", "fp8": "hybrid"}
    configs("Qwen2.5-VL-72B-Instruct", values, tensor_model_parallel_size=4)
    with pytest.raises(ValueError, match=r"7392 is not a multiple of 128.*lower tensor_model_parallel_size"):
        configs("Qwen2.5-VL-72B-Instruct", values | {"fp8_recipe": "blockwise"}, tensor_model_parallel_size=4)


def test_layers_are_built_from_transformer_engine(installed) -> None:
    spec = layer_spec(AttnMaskType.causal, transformer_impl="transformer_engine")
    attention, mlp = spec.submodules.self_attention, spec.submodules.mlp
    assert attention.params == {"attn_mask_type": AttnMaskType.causal}
    assert attention.submodules.linear_qkv is extensions.TELayerNormColumnParallelLinear
    assert attention.submodules.core_attention is extensions.TEDotProductAttention
    assert attention.submodules.linear_proj is extensions.TERowParallelLinear
    assert mlp.submodules.linear_fc1 is extensions.TELayerNormColumnParallelLinear
    assert mlp.submodules.linear_fc2 is extensions.TERowParallelLinear
    assert final_norm("transformer_engine") is extensions.TENorm


def test_qwen3_layers_keep_their_parts_under_transformer_engine(installed) -> None:
    dense = decoder_layer_spec(num_experts=0, transformer_impl="transformer_engine")
    assert dense.module is DeepstackLayer
    attention = dense.submodules.self_attention.submodules
    assert attention.q_layernorm is attention.k_layernorm is extensions.TENorm
    assert dense.submodules.mlp.submodules.linear_fc1 is extensions.TELayerNormColumnParallelLinear
    sparse = decoder_layer_spec(num_experts=8, transformer_impl="transformer_engine")
    assert sparse.submodules.mlp.submodules.router is WeightedRouter
    assert sparse.submodules.pre_mlp_layernorm is extensions.TENorm, "a router's norm is no part of a linear layer"
    assert "pre_mlp_layernorm." not in sparse.submodules.sharded_state_dict_keys_map
