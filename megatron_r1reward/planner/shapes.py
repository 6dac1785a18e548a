"""Sizes of a model, read from a Hugging Face `config.json` of either family; nothing is copied per model size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")

# What transformers assumes where a Qwen2.5-VL file leaves a vision key out (Qwen2_5_VLVisionConfig).
_VISION_DEFAULTS = {
    "qwen2_5_vl": dict(
        depth=32, hidden_size=3584, intermediate_size=3420, num_heads=16, patch_size=14, window_size=112
    ),
    "qwen3_vl": dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16),
}


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Mixture of experts of one layer: `top_k` of `count` experts of width `ffn` see each token."""

    count: int
    top_k: int
    ffn: int
    dense_layers: frozenset[int]  # layers that keep an ordinary MLP


@dataclass(frozen=True, kw_only=True)
class TextShape:
    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int  # key-value heads
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    experts: Experts | None

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        """Width of keys plus values."""
        return 2 * self.groups * self.head_dim

    def is_sparse(self, layer: int) -> bool:
        return self.experts is not None and layer not in self.experts.dense_layers


@dataclass(frozen=True, kw_only=True)
class VisionShape:
    blocks: int
    hidden: int
    ffn: int
    heads: int
    gated: bool  # gate and up projection (Qwen2.5-VL) or one linear (Qwen3-VL)
    out: int
    patch: int  # pixels
    merge: int  # merge units of merge x merge patches become one token
    patch_values: int  # channels x frames x pixels of one patch
    full_attention_blocks: int
    window_patches: int | None  # patches of one attention window; None: every block attends to the whole frame
    position_embeddings: int  # learned rows; 0: rotary only
    deepstack: int  # extra mergers whose outputs enter the first language layers

    @property
    def unit(self) -> int:
        """Patches per token."""
        return self.merge**2

    def patches(self, pixels: int) -> int:
        """Patches of an image of at most `pixels`, a whole number of merge units."""
        side = self.patch * self.merge
        return max(pixels // side**2, 1) * self.unit


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    family: Family
    text: TextShape
    vision: VisionShape


def read_shape(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """Sizes from the parsed `config.json`, in the published layout (Qwen2.5-VL keeps the text keys at the top level) or
    the nested one that transformers 5 writes.

    Raises:
        ValueError: another model type, or a size is missing; the message names it and `where`.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{where}: model_type {family!r} is not supported: give one of {', '.join(FAMILIES)}")
    text = {**{k: v for k, v in config.items() if not isinstance(v, dict)}, **config.get("text_config", {})}
    vision = {**_VISION_DEFAULTS["qwen2_5_vl" if family == "qwen2_5_vl" else "qwen3_vl"], **config["vision_config"]}
    try:
        return ModelShape(family=family, text=_text(family, text, config), vision=_vision(family, vision))
    except KeyError as error:
        raise ValueError(f"{where}: {error.args[0]!r} is missing") from error


def _text(family: Family, text: Mapping[str, Any], config: Mapping[str, Any]) -> TextShape:
    heads = text["num_attention_heads"]
    return TextShape(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        ffn=text["intermediate_size"],
        heads=heads,
        groups=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        vocab=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        qkv_bias=family == "qwen2_5_vl",
        qk_norm=family != "qwen2_5_vl",
        max_positions=text.get("max_position_embeddings", 32_768),
        experts=_experts(text) if family == "qwen3_vl_moe" else None,
    )


def _experts(text: Mapping[str, Any]) -> Experts:
    step, layers = text.get("decoder_sparse_step", 1), text["num_hidden_layers"]
    dense = {layer for layer in range(layers) if (layer + 1) % step} | set(text.get("mlp_only_layers") or ())
    return Experts(
        count=text["num_experts"] if "num_experts" in text else text["num_local_experts"],
        top_k=text["num_experts_per_tok"],
        ffn=text["moe_intermediate_size"],
        dense_layers=frozenset(dense),
    )


def _vision(family: Family, vision: Mapping[str, Any]) -> VisionShape:
    windowed = family == "qwen2_5_vl"
    patch = vision["patch_size"]
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    return VisionShape(
        blocks=vision["depth"],
        hidden=vision["hidden_size"],
        ffn=vision["intermediate_size"],
        heads=vision["num_heads"],
        gated=windowed,
        out=vision["out_hidden_size"],
        patch=patch,
        merge=vision.get("spatial_merge_size", 2),
        patch_values=channels * vision.get("temporal_patch_size", 2) * patch**2,
        full_attention_blocks=len(vision["fullatt_block_indexes"]) if windowed else vision["depth"],
        window_patches=(vision["window_size"] // patch) ** 2 if windowed else None,
        position_embeddings=0 if windowed else vision["num_position_embeddings"],
        deepstack=0 if windowed else len(vision.get("deepstack_visual_indexes", ())),
    )
