"""What a model computes, read from a Hugging Face `config.json` of any family; nothing is copied per model size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_r1reward.model_folder.config_reader import ConfigReader, parse_config

Family = Literal["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]
FAMILIES: tuple[Family, ...] = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SCALAR = "ForSequenceClassification"  # ends the architecture of a model with a scalar head, for transformers and vLLM
MAX_NAMED = 5  # problems that a message names

# What transformers assumes where a file leaves a key out (Qwen2_5_VLVisionConfig, Qwen3VLVisionConfig and so on).
_VISION_DEFAULTS: dict[bool, dict[str, int]] = {
    True: dict(depth=32, hidden_size=3584, intermediate_size=3420, num_heads=16, patch_size=14, out_hidden_size=3584),
    False: dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16, out_hidden_size=3584),
}
_ROPE_THETA = {"qwen2_5_vl": 1_000_000.0, "qwen3_vl": 500_000.0, "qwen3_vl_moe": 500_000.0}
_KEY_VALUE_HEADS = {"qwen2_5_vl": 8, "qwen3_vl": 32, "qwen3_vl_moe": 16}  # null, in contrast, is one per head
_ROPE_KEYS = ("rope_scaling", "rope_parameters")  # of transformers up to 4.x, and later
_RMS_NORM_EPS = {"qwen2_5_vl": 1e-5, "qwen3_vl": 1e-6, "qwen3_vl_moe": 1e-6}


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Mixture of experts of one layer: `top_k` of `count` experts of width `ffn` see each token."""

    count: int
    top_k: int
    ffn: int
    dense_layers: frozenset[int]  # layers that keep an ordinary MLP


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN scaling of the rotary frequencies (arXiv 2309.00071): `factor` times `original_positions`."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, kw_only=True)
class Rope:
    theta: float
    sections: tuple[int, int, int]  # frequencies of the temporal, height and width positions
    yarn: Yarn | None


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
    norm_eps: float
    rope: Rope
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

    @property
    def sparse_layers(self) -> int:
        return sum(self.is_sparse(layer) for layer in range(self.layers))


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
    channels: int
    frames: int  # of one patch
    full_attention_blocks: int
    window_patches: int | None  # patches of one attention window; None: every block attends to the whole frame
    position_embeddings: int  # learned rows; 0: rotary only
    deepstack: int  # extra mergers whose outputs enter the first language layers

    @property
    def patch_values(self) -> int:
        """Channels x frames x pixels of one patch."""
        return self.channels * self.frames * self.patch**2

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
    image_token_id: int
    score_layers: int = 0  # of the scalar head in place of the LM head: 1 linear, 2 with a hidden layer; 0: an LM head
    quantized: str | None  # method of the folder's weights, e.g. "compressed-tensors"; such a folder serves, not trains

    def cut_ffn_sizes(self, *, whole_experts: bool) -> tuple[int, ...]:
        """Feed-forward sizes of the language model that tensor parallelism cuts. Under expert parallelism experts are
        whole."""
        text = self.text
        sizes = [text.ffn] if text.sparse_layers < text.layers else []
        if text.experts is not None and text.sparse_layers and not whole_experts:
            sizes.append(text.experts.ffn)
        return tuple(sizes)

    @property
    def vision_layers_per_token(self) -> float:
        """Multiplications of encoding one image token, in language-model layers of one token; attention scores are
        small beside both."""
        text, vision = self.text, self.vision
        patch = vision.blocks * (4 * vision.hidden**2 + (3 if vision.gated else 2) * vision.hidden * vision.ffn)
        routed = text.experts.top_k * text.experts.ffn * text.sparse_layers if text.experts is not None else 0
        ffn = (text.ffn * (text.layers - text.sparse_layers) + routed) / text.layers
        layer = text.hidden * (2 * text.query + text.key_value) + 3 * text.hidden * ffn
        return vision.unit * patch / layer


def load_shape(folder: Path) -> ModelShape:
    """`read_shape` of a model folder."""
    path = folder / "config.json"
    return read_shape(parse_config(path), str(path))


def read_shape(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """Read the parsed `config.json`, in the published layout (Qwen2.5-VL keeps the text keys at the top level) or the
    nested one that transformers writes.

    Raises:
        ValueError: another model type; a size is missing or no size; or a key changes the model in a way that is not
            implemented. The message names `where`, the keys and their values.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{where}: model_type {family!r} is not supported: give one of {', '.join(FAMILIES)}")
    problems: list[str] = []
    top = ConfigReader(config, "", problems)
    vision = ConfigReader(top.get("vision_config", {}), "vision_config", problems)
    nested = top.has("text_config") or family != "qwen2_5_vl"
    text = ConfigReader(top.get("text_config", {}), "text_config", problems) if nested else top
    image_token_id = top.token("image_token_id", 151_655)
    top.ignore("video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id", "text_config")
    text.ignore("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    score_layers = _score_layers(top)
    tied = _tied(family, top, text) and not score_layers  # the embedding scores nothing
    shape = ModelShape(
        family=family,
        text=_text(family, text, tied=tied),
        vision=_vision(family, vision),
        image_token_id=image_token_id,
        score_layers=score_layers,
        quantized=_quantization(top),
    )
    _agree(shape, problems)
    for reader in {id(reader): reader for reader in (top, text, vision)}.values():
        reader.finish()
    if problems:
        more = f" and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise ValueError(f"{where}: {'; '.join(problems[:MAX_NAMED])}{more}")
    return shape


def _tied(family: Family, top: ConfigReader, text: ConfigReader) -> bool:
    """transformers' rule, and vLLM's: the top level decides; Qwen2.5-VL's older folders said it in `text_config`
    alone."""
    inner, outer = text.flag("tie_word_embeddings", False), top.flag("tie_word_embeddings", False)
    return outer or (inner and family == "qwen2_5_vl")


def is_scalar(config: Mapping[str, Any]) -> bool:
    """Whether a parsed `config.json` is of a model with a scalar head."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(SCALAR) for name in names)


def _score_layers(top: ConfigReader) -> int:
    """Layers of the scalar head: transformers' architecture names say that there is one, `score_layers` how deep."""
    if not is_scalar(top.tree):
        return 0
    labels = top.get("id2label", {"0": ""})
    if not isinstance(labels, Mapping) or len(labels) != 1:
        top.problem("id2label", "a classifier of several labels is not implemented, only one reward is")
    layers = top.size("score_layers", 1)
    if layers > 2:
        top.problem("score_layers", "1 (linear) or 2 (with a hidden layer) is needed")
    return layers


def _quantization(top: ConfigReader) -> str | None:
    value = top.get("quantization_config")
    if value is None:
        return None
    method = value.get("quant_method") if isinstance(value, Mapping) else None
    if not isinstance(method, str):
        top.problem("quantization_config", "an object with a quant_method is needed")
        return None
    return method


def _text(family: Family, text: ConfigReader, *, tied: bool) -> TextShape:
    heads, hidden, layers = text.size("num_attention_heads"), text.size("hidden_size"), text.size("num_hidden_layers")
    groups = text.size("num_key_value_heads", heads if "num_key_value_heads" in text.tree else _KEY_VALUE_HEADS[family])
    if heads % groups:
        text.problem("num_key_value_heads", f"has to divide num_attention_heads {heads}")
    head_dim = hidden // heads
    if family != "qwen2_5_vl":
        head_dim = text.size("head_dim", 128 if family == "qwen3_vl" else max(head_dim, 1))
    elif hidden % heads:
        text.problem("hidden_size", f"has to be a multiple of num_attention_heads {heads}")
    text.only("hidden_act", "silu")
    text.only("attention_dropout", 0.0)
    text.only("attention_bias", family == "qwen2_5_vl")
    text.only("use_sliding_window", False)
    if not text.get("use_sliding_window", False):
        text.ignore("sliding_window", "max_window_layers")
    kinds = text.get("layer_types", ["full_attention"])
    if not isinstance(kinds, list) or set(map(str, kinds)) != {"full_attention"}:
        text.problem("layer_types", 'not implemented, only "full_attention" is')
    vocab, pad = text.size("vocab_size"), text.get("pad_token_id")
    if isinstance(pad, int) and pad >= vocab:  # transformers cannot build the model
        text.problem("pad_token_id", f"outside the vocabulary of {vocab}")
    return TextShape(
        layers=layers,
        hidden=hidden,
        ffn=text.size("intermediate_size"),
        heads=heads,
        groups=groups,
        head_dim=max(head_dim, 1),
        vocab=vocab,
        tied=tied,
        qkv_bias=family == "qwen2_5_vl",
        qk_norm=family != "qwen2_5_vl",
        max_positions=text.size("max_position_embeddings", 32_768 if family == "qwen2_5_vl" else 128_000),
        norm_eps=text.positive("rms_norm_eps", _RMS_NORM_EPS[family]),
        rope=_rope(family, text, head_dim),
        experts=_experts(text, layers) if family == "qwen3_vl_moe" else None,
    )


def _rope(family: Family, text: ConfigReader, head_dim: int) -> Rope:
    key = "rope_scaling" if text.has("rope_scaling") else "rope_parameters"
    text.ignore("rope_scaling", "rope_parameters")
    if text.has("rope_scaling") and text.has("rope_parameters") and len({str(text.get(k)) for k in _ROPE_KEYS}) > 1:
        text.problem("rope_scaling", "rope_parameters beside it says something else: keep one of them")
    rope = ConfigReader(text.get(key, {}), text.name(key), text.problems)
    theta = rope.positive("rope_theta", text.positive("rope_theta", _ROPE_THETA[family]))
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.ignore("type", "rope_type")
    yarn = None
    if kind == "yarn":
        yarn = Yarn(
            factor=rope.positive("factor", 1.0),
            original_positions=rope.size("original_max_position_embeddings"),
            beta_fast=rope.positive("beta_fast", 32.0),
            beta_slow=rope.positive("beta_slow", 1.0),
        )
        if not rope.has("factor"):
            rope.problems.append(f"{rope.name('factor')} is missing")
    elif kind not in (("default", "mrope") if family == "qwen2_5_vl" else ("default",)):  # transformers' names
        rope.problem("rope_type" if rope.has("rope_type") else "type", 'not implemented, only "default" and "yarn" are')
    if family != "qwen2_5_vl":
        rope.only("mrope_interleaved", True)
    sections = rope.get("mrope_section")
    good = isinstance(sections, list | tuple) and len(sections) == 3
    if not good or not all(isinstance(n, int) and n > 0 for n in sections) or 2 * sum(sections) != head_dim:
        rope.problem("mrope_section", f"three sizes that add up to half the head dimension {head_dim} are needed")
        sections = (1, 1, 1)
    rope.finish()
    return Rope(theta=theta, sections=tuple(sections), yarn=yarn)


def _experts(text: ConfigReader, layers: int) -> Experts:
    step = text.size("decoder_sparse_step", 1)
    plain = text.indices("mlp_only_layers", (), layers)
    text.only("norm_topk_prob", True)
    count = text.size("num_experts", text.get("num_local_experts", 60))
    top_k = text.size("num_experts_per_tok", 4)
    if not 1 < top_k <= count:  # one expert: its weight would always be 1, and the router would not train
        text.problem(
            "num_experts_per_tok", f"has to be from 2 (with 1 the router would not train) to the {count} experts"
        )
    return Experts(
        count=count,
        top_k=top_k,
        ffn=text.size("moe_intermediate_size", 1408),
        dense_layers=frozenset({layer for layer in range(layers) if (layer + 1) % step} | set(plain)),
    )


def _vision(family: Family, vision: ConfigReader) -> VisionShape:
    windowed = family == "qwen2_5_vl"
    default = _VISION_DEFAULTS[windowed]
    blocks, hidden = vision.size("depth", default["depth"]), vision.size("hidden_size", default["hidden_size"])
    heads, patch = vision.size("num_heads", default["num_heads"]), vision.size("patch_size", default["patch_size"])
    if hidden % (4 * heads):
        vision.problem("num_heads", f"hidden_size {hidden} has to be a multiple of 4 times it")
    vision.only("hidden_act", "silu" if windowed else "gelu_pytorch_tanh")
    vision.only("in_chans", vision.size("in_channels", 3))  # transformers reads the second
    rope = vision.get("rope_parameters", {})
    if rope and (rope.get("rope_type"), rope.get("rope_theta", 10_000)) != ("axial", 10_000):
        vision.problem("rope_parameters", "not implemented, only axial positions with rope_theta 10000 are")
    full, window = blocks, None
    if windowed:
        full = len(vision.indices("fullatt_block_indexes", (7, 15, 23, 31) if blocks > 31 else None, blocks))
        window = (vision.size("window_size", 112) // patch) ** 2
        if not window:
            vision.problem("window_size", f"smaller than a patch of {patch} pixels")
        vision.only("spatial_patch_size", patch)
        vision.size("tokens_per_second", 4)
    positions = 0 if windowed else vision.size("num_position_embeddings", 2304)
    if math.isqrt(positions) ** 2 != positions:
        vision.problem("num_position_embeddings", "a square number is needed: rows x columns")
    deepstack = () if windowed else vision.indices("deepstack_visual_indexes", (8, 16, 24), blocks)
    return VisionShape(
        blocks=blocks,
        hidden=hidden,
        ffn=vision.size("intermediate_size", default["intermediate_size"]),
        heads=heads,
        gated=windowed,
        out=vision.size("out_hidden_size", default["out_hidden_size"]),
        patch=patch,
        merge=vision.size("spatial_merge_size", 2),
        channels=vision.size("in_channels", 3),
        frames=vision.size("temporal_patch_size", 2),
        full_attention_blocks=full,
        window_patches=window,
        position_embeddings=positions,
        deepstack=len(deepstack),
    )


def _agree(shape: ModelShape, problems: list[str]) -> None:
    """What has to fit between the two parts of a model."""
    text, vision = shape.text, shape.vision
    if vision.out != text.hidden:
        problems.append(f"vision_config.out_hidden_size {vision.out} is not the text's hidden_size {text.hidden}")
    if vision.deepstack > text.layers:
        problems.append(f"{vision.deepstack} deepstack_visual_indexes are more than the {text.layers} decoder layers")
    if shape.image_token_id >= text.vocab:
        problems.append(f"image_token_id {shape.image_token_id} is outside the vocabulary of {text.vocab}")
