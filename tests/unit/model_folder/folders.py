"""Model folders of a few kilobytes, written without torch: sizes, names and files as published, values all zero."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1reward.model_folder import safetensors_layout as st
from megatron_r1reward.model_folder.folder_weights import weight_table
from megatron_r1reward.model_folder.shape import read_shape
from megatron_r1reward.types import TensorMeta

_VISION = dict(depth=2, hidden_size=32, intermediate_size=24, num_heads=2, out_hidden_size=32, spatial_merge_size=2)
_TEXT = dict(
    hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=26, max_position_embeddings=512, hidden_act="silu",
)  # fmt: skip


def config(family: str = "qwen2_5_vl") -> dict[str, Any]:
    """A `config.json`: Qwen2.5-VL's in the flat, published layout."""
    if family == "qwen2_5_vl":
        rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
        vision = dict(
            hidden_act="silu", fullatt_block_indexes=[1], window_size=56, patch_size=14, temporal_patch_size=2
        )
        text = dict(rope_scaling=rope, rope_theta=1e4, use_sliding_window=False, sliding_window=4096)
        tree = {"model_type": family, "image_token_id": 25, **_TEXT, **text, "vision_config": _VISION | vision}
        return tree | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    vision = dict(
        hidden_act="gelu_pytorch_tanh", deepstack_visual_indexes=[0], patch_size=16, num_position_embeddings=16
    )
    text = dict(rope_scaling=rope, rope_theta=1e4, head_dim=8, attention_bias=False, dtype="bfloat16")
    if family == "qwen3_vl_moe":
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True)
    tree = {"model_type": family, "image_token_id": 25, "text_config": _TEXT | text, "vision_config": _VISION | vision}
    return tree | {"tie_word_embeddings": False}


def write_weights(folder: Path, metas: list[TensorMeta], name: str = st.SINGLE) -> None:
    file = st.build_file(name, metas)
    with (folder / name).open("wb") as handle:
        handle.write(file.header_bytes())
        handle.truncate(file.size)


def metas(tree: dict[str, Any], **changed: tuple[int, ...]) -> list[TensorMeta]:
    """The tensors that a configuration describes; `changed`: other shapes by name, `__` for a dot."""
    shapes = weight_table(read_shape(tree)).hf_shapes | {k.replace("__", "."): v for k, v in changed.items()}
    return [TensorMeta(name=name, dtype="bfloat16", shape=shape) for name, shape in shapes.items()]


def write_folder(folder: Path, family: str = "qwen2_5_vl", tree: dict[str, Any] | None = None) -> Path:
    """A whole folder: configuration, weights, tokenizer, chat template, image processor."""
    tree = tree or config(family)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    write_weights(folder, metas(tree))
    words = {chr(ord("a") + number): number for number in range(24)}
    tokens = [{"id": 24, "content": "<|im_end|>"}, {"id": 25, "content": "<|image_pad|>"}]
    tokenizer = {"added_tokens": tokens, "model": {"type": "BPE", "vocab": words, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    processor = {"patch_size": tree["vision_config"]["patch_size"], "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
