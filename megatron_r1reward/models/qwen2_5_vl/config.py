"""megatron-core configurations derived from a Hugging Face Qwen2.5-VL `config.json`: one source, no per-size copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import Qwen2_5_VLConfig

from megatron_r1reward.cluster.legality import check_layout, split_layers
from megatron_r1reward.config.schema import ParallelSection, PrecisionSection
from megatron_r1reward.model_folder.shape import ModelShape, TextShape, read_shape
from megatron_r1reward.parallel.precision import fp8_arguments
from megatron_r1reward.parallel.transformer import (
    check_language_config,
    common_arguments,
    layout_arguments,
    recompute_arguments,
    scale_rotations,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfigs:
    """The three megatron-core configurations of one model and the Hugging Face one they come from."""

    hf: Qwen2_5_VLConfig
    shape: ModelShape
    language: TransformerConfig
    vision: TransformerConfig
    merger: TransformerConfig
    parallel: ParallelSection
    transformer_impl: str
    chunk_layers: tuple[int, ...]  # language-model layers of every pipeline chunk, in model order


def build_configs(
    hf: Qwen2_5_VLConfig,
    parallel: ParallelSection,
    dtype: torch.dtype,
    precision: PrecisionSection = PrecisionSection(),  # noqa: B008 (frozen)
) -> ModelConfigs:
    """Derive the language, vision and merger configurations.

    Raises:
        ValueError: the layout or the precision does not fit the model.
    """
    shape = read_shape(hf.to_dict())
    check_layout(shape, parallel)
    text, vision = hf.text_config, hf.vision_config
    tp = parallel.tensor_model_parallel_size
    vision_tp = tp if parallel.vision == "tensor_parallel" else 1
    common = common_arguments(dtype) | dict(deterministic_mode=precision.deterministic)
    vision_recompute = recompute_arguments("full") if parallel.recompute_vision else {}
    gated = dict(gated_linear_unit=True, activation_func=F.silu, normalization="RMSNorm")
    language = TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        ffn_hidden_size=text.intermediate_size,
        layernorm_epsilon=text.rms_norm_eps,
        add_bias_linear=False,
        add_qkv_bias=True,
        mrope_section=list(shape.text.rope.sections),
        **layout_arguments(shape, parallel, dtype),
        **recompute_arguments(parallel.recompute, parallel.recompute_num_layers),
        **fp8_arguments(precision, parallel, _fp8_sizes(shape.text, tp), dtype),
        **gated,
        **common,
    )
    scale_rotations(language, shape.text.rope)
    check_language_config(language)
    # The tower never takes part in the language model's pipeline or sequence parallelism: a config of its own says so.
    tower = TransformerConfig(
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_heads,
        num_query_groups=vision.num_heads,
        ffn_hidden_size=vision.intermediate_size,
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        add_qkv_bias=True,
        tensor_model_parallel_size=vision_tp,
        **vision_recompute,
        **gated,
        **common,
    )
    merger = TransformerConfig(
        num_layers=1,
        hidden_size=vision.out_hidden_size,
        ffn_hidden_size=vision.hidden_size * vision.spatial_merge_size**2,
        num_attention_heads=text.num_attention_heads,  # unused by the merger, but must divide by tp
        gated_linear_unit=False,
        activation_func=F.gelu,
        add_bias_linear=True,
        tensor_model_parallel_size=vision_tp,
        **common,
    )
    return ModelConfigs(
        hf=hf,
        shape=shape,
        language=language,
        vision=tower,
        merger=merger,
        parallel=parallel,
        transformer_impl=precision.transformer_impl,
        chunk_layers=tuple(split_layers(shape, parallel)),
    )


def _fp8_sizes(text: TextShape, tp: int) -> dict[str, int]:
    """Inner and outer sizes of this rank's matrix products in a language-model layer."""
    return {
        "hidden_size": text.hidden,
        "attention output per rank": text.query // tp,
        "query, key and value rows per rank": (text.heads + 2 * max(text.groups, tp)) * text.head_dim // tp,
        "intermediate_size per rank": text.ffn // tp,
    }
