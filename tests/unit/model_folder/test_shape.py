"""What config.json says is implemented, or named: no key changes a model in silence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from folders import config
from transformers import AutoConfig

from megatron_r1reward.model_folder.shape import Yarn, load_shape, read_shape
from megatron_r1reward.planner.catalog import bundled_config, bundled_names

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


def changed(family: str, part: str, **keys: Any) -> dict[str, Any]:
    tree = copy.deepcopy(config(family))
    target = tree[part] if part else tree
    target.update(keys)
    return tree


@pytest.mark.parametrize(
    ("family", "part", "keys", "named"),
    [
        ("qwen2_5_vl", "", {"use_sliding_window": True}, "use_sliding_window = true: not implemented"),
        ("qwen2_5_vl", "", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ("qwen2_5_vl", "", {"hidden_act": "gelu"}, 'hidden_act = "gelu": not implemented, only "silu"'),
        ("qwen2_5_vl", "vision_config", {"hidden_act": "gelu"}, "vision_config.hidden_act"),
        ("qwen3_vl", "vision_config", {"hidden_act": "silu"}, 'only "gelu_pytorch_tanh" is'),
        ("qwen2_5_vl", "", {"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1, 1, 2]}}, '"linear"'),
        (
            "qwen2_5_vl",
            "",
            {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
            "rope_parameters beside it says something else",
        ),
        ("qwen2_5_vl", "", {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ("qwen2_5_vl", "", {"logit_scale": 2.0}, "logit_scale = 2.0: unknown here, so it may change the model"),
        ("qwen2_5_vl", "", {"attention_bias": False}, "attention_bias"),
        ("qwen3_vl", "text_config", {"attention_bias": True}, "attention_bias = true"),
        ("qwen3_vl", "text_config", {"final_logit_softcapping": 30.0}, "text_config.final_logit_softcapping"),
        (
            "qwen3_vl",
            "text_config",
            {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 1]}},
            "sizes that add",
        ),
        (
            "qwen3_vl",
            "text_config",
            {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            'type = "mrope": not implemented',
        ),
        ("qwen3_vl_moe", "text_config", {"norm_topk_prob": False}, "norm_topk_prob = false"),
        ("qwen3_vl_moe", "text_config", {"num_shared_experts": 1}, "num_shared_experts"),
        ("qwen2_5_vl", "vision_config", {"in_chans": 4}, "in_chans = 4: not implemented, only 3"),
        ("qwen2_5_vl", "", {"hidden_size": "32"}, "a positive integer is needed"),
        ("qwen2_5_vl", "", {"pad_token_id": 26}, "pad_token_id = 26: outside the vocabulary of 26"),
        ("qwen2_5_vl", "", {"image_token_id": 26}, "image_token_id 26 is outside the vocabulary of 26"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(family: str, part: str, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        read_shape(changed(family, part, **keys))


def test_keys_about_other_matters_and_keys_that_are_off_do_not_disturb() -> None:
    keys = dict(use_cache=True, transformers_version="4.41", sliding_window=None, unsloth_fixed=True, new_key=None)
    assert read_shape(changed("qwen2_5_vl", "", **keys)) == read_shape(config())


def test_yarn_is_read_and_what_servers_would_do_otherwise_is_not() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mrope_section": [1, 1, 2]}
    assert read_shape(changed("qwen2_5_vl", "", rope_scaling=yarn)).text.rope.yarn == Yarn(
        factor=4.0, original_positions=128, beta_fast=32.0, beta_slow=1.0
    )
    for key in ("attention_factor", "mscale", "truncate"):
        with pytest.raises(ValueError, match=f"rope_scaling.{key}"):
            read_shape(changed("qwen2_5_vl", "", rope_scaling=yarn | {key: 2.0}))


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled_names())
def test_sizes_and_ties_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """As published, as transformers writes it, and with the keys of the tie moved or left out."""
    tree = bundled_config(name)
    variants = [tree]
    for top in (None, True, False):
        for inner in (None, True, False):
            variant: Any = copy.deepcopy(tree)
            variant.pop("tie_word_embeddings", None)
            text = variant.get("text_config", variant)
            text.pop("tie_word_embeddings", None)
            if inner is not None:
                text["tie_word_embeddings"] = inner
            if top is not None:
                variant["tie_word_embeddings"] = top
            variants.append(variant)
    for variant in variants:
        (tmp_path / "config.json").write_text(json.dumps(variant))
        hf = AutoConfig.from_pretrained(tmp_path)
        shape = load_shape(tmp_path)
        assert shape.text.tied == hf.tie_word_embeddings
        hf.save_pretrained(tmp_path / "saved")
        assert load_shape(tmp_path / "saved") == shape
        text = hf.text_config
        assert (shape.text.layers, shape.text.hidden, shape.text.vocab) == (
            text.num_hidden_layers,
            text.hidden_size,
            text.vocab_size,
        )
        assert (shape.text.norm_eps, shape.text.rope.theta) == (text.rms_norm_eps, text.rope_parameters["rope_theta"])
        assert (shape.vision.blocks, shape.vision.ffn) == (hf.vision_config.depth, hf.vision_config.intermediate_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen2.5-VL-32B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-30B-A3B-Instruct"])
def test_a_key_that_is_left_out_is_what_transformers_assumes_or_named(name: str, tmp_path: Path) -> None:
    tree = bundled_config(name)
    accepted = 0
    for part in {"", "text_config", "vision_config"} & {"", *tree}:
        for key in tree[part] if part else tree:  # type: ignore[attr-defined]
            if key in ("model_type", "text_config", "vision_config"):
                continue
            variant: Any = copy.deepcopy(tree)
            del (variant[part] if part else variant)[key]
            try:
                shape = read_shape(variant)
            except ValueError:
                continue
            accepted += 1
            (tmp_path / "config.json").write_text(json.dumps(variant))
            hf = AutoConfig.from_pretrained(tmp_path)
            text, vision, experts = hf.text_config, hf.vision_config, shape.text.experts
            read = (shape.text.layers, shape.text.hidden, shape.text.ffn, shape.text.heads, shape.text.groups)
            assert read == (
                text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.num_attention_heads,
                text.num_key_value_heads,
            ), (part, key)  # fmt: skip
            assert shape.text.head_dim == getattr(text, "head_dim", text.hidden_size // text.num_attention_heads), key
            assert (shape.text.vocab, shape.text.tied) == (text.vocab_size, hf.tie_word_embeddings), (part, key)
            if experts is not None:
                chosen = (text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size)
                assert (experts.count, experts.top_k, experts.ffn) == chosen, (part, key)
            read = (shape.vision.blocks, shape.vision.hidden, shape.vision.ffn, shape.vision.heads, shape.vision.patch)
            assert read == (
                vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads, vision.patch_size
            ), (part, key)  # fmt: skip
    assert accepted > 15
